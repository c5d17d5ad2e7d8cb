"""Train the small byte-level Llama in this folder on Python's standard library.

    python train.py --out /tmp/model --seconds 300

One token is one byte. Byte 0 separates files in the training stream. The
modules in HELD_OUT and their tests are kept out of training; their text is
copied to OUT/heldout and scored with the stored bfloat16 weights.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sysconfig
import time
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 2048
HELD_OUT = ("fractions", "heapq", "shlex", "statistics", "textwrap")
SKIPPED_FOLDERS = {"site-packages", "encodings", "pydoc_data", "lib2to3"}
SAMPLE_PROMPT = 'def count_lines(filename):\n    """'


def model_config():
    """The architecture: 8 query heads share 2 key/value heads of 64 channels."""
    return LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def is_training_file(path, stdlib):
    """Whether a file may be trained on: real source, and nothing about a held-out module."""
    if SKIPPED_FOLDERS & set(path.relative_to(stdlib).parts):
        return False
    if path.name.startswith("_sysconfigdata"):
        return False
    return path.stem.removeprefix("test_") not in HELD_OUT


def read_training_files(stdlib):
    """The UTF-8 source files to train on, as bytes, in a fixed order."""
    sources = []
    for path in sorted(stdlib.rglob("*.py")):
        if not is_training_file(path, stdlib):
            continue
        source = path.read_bytes()
        try:
            source.decode("utf-8")
        except UnicodeDecodeError:
            continue
        sources.append(source)
    return sources


def copy_held_out(stdlib, folder):
    """Copy the held-out modules to folder as .py.txt files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in HELD_OUT:
        (folder / f"{name}.py.txt").write_bytes((stdlib / f"{name}.py").read_bytes())


def as_tensor(text, device="cpu"):
    """Bytes as a one-dimensional uint8 tensor."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)


def random_batch(stream, batch):
    """A batch of windows of CONTEXT + 1 bytes from random places of the stream."""
    starts = torch.randint(len(stream) - CONTEXT, (batch, 1), device=stream.device)
    offsets = torch.arange(CONTEXT + 1, device=stream.device)
    return stream[starts + offsets].long()


def next_byte_loss(model, window, reduction="mean"):
    """Cross-entropy (nats) of each byte of window but the first, given those before it."""
    logits = model(input_ids=window[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten(), reduction=reduction)


def learning_rate(progress, peak, warmup=0.02, floor=0.02):
    """Linear warm-up, then a cosine down to floor * peak; progress runs from 0 to 1."""
    if progress < warmup:
        return peak * (progress + 1e-3) / warmup
    cosine = 0.5 + 0.5 * math.cos(math.pi * (progress - warmup) / (1 - warmup))
    return peak * (floor + (1 - floor) * cosine)


def make_optimizer(model, weight_decay):
    """AdamW that decays the matrices and leaves the norms alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def train_step(loss_fn, model, optimizer, window, rate):
    """One update at the given learning rate; returns the loss as a tensor."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast(window.device.type, dtype=torch.bfloat16):
        loss = loss_fn(model, window)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def train(model, stream, args):
    """Train for args.seconds (compilation not counted); returns (steps, final loss, seconds)."""
    loss_fn = torch.compile(next_byte_loss) if args.compile else next_byte_loss
    optimizer = make_optimizer(model, args.weight_decay)
    train_step(loss_fn, model, optimizer, random_batch(stream, args.batch), 0.0).item()
    start = time.monotonic()
    steps, recent = 0, []
    while (elapsed := time.monotonic() - start) < args.seconds:
        rate = learning_rate(elapsed / args.seconds, args.lr)
        loss = train_step(loss_fn, model, optimizer, random_batch(stream, args.batch), rate)
        recent = [*recent[-99:], loss]
        steps += 1
        if steps % args.log_every == 0:
            print(f"{elapsed:6.1f} s  step {steps:6d}  lr {rate:.2e}  loss {mean(recent):.4f}")
    return steps, mean(recent), time.monotonic() - start


def mean(losses):
    """The mean of a list of scalar tensors, as a float."""
    return torch.stack(losses).mean().item()


@torch.no_grad()
def bits_of_text(model, text):
    """(bits, predicted bytes) of text, cut into disjoint windows of at most CONTEXT bytes.

    Each window is scored on its own, without context from the one before; its
    first byte is not predicted and does not count.
    """
    bits, predicted = 0.0, 0
    for window in as_tensor(text, model.device).long().split(CONTEXT):
        if len(window) < 2:
            continue
        bits += next_byte_loss(model, window[None], reduction="sum").item() / math.log(2)
        predicted += len(window) - 1
    return bits, predicted


def held_out_bits_per_byte(model, folder):
    """Bits per predicted byte of each held-out file, and of all of them under 'total'."""
    scores = {p.name: bits_of_text(model, p.read_bytes()) for p in sorted(folder.glob("*.txt"))}
    scores["total"] = tuple(map(sum, zip(*scores.values(), strict=True)))
    return {name: round(bits / predicted, 4) for name, (bits, predicted) in scores.items()}


def write_sample(model, path, length=600):
    """Let the model continue SAMPLE_PROMPT greedily and store prompt and continuation."""
    prompt = as_tensor(SAMPLE_PROMPT.encode(), model.device).long()[None]
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=length,
        do_sample=False,
    )
    path.write_bytes(bytes(output[0].tolist()))


def device_name(device):
    """A readable name of the device trained on."""
    return torch.cuda.get_device_name() if device == "cuda" else platform.machine()


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--stdlib-version", default=platform.python_version())
    parser.add_argument("--seconds", type=float, default=300, help="training time")
    parser.add_argument("--batch", type=int, default=32, help="windows per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=200)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def settings(args):
    """The part of the report that is known before training."""
    return {
        "stdlib": f"CPython {args.stdlib_version}",
        "batch": args.batch,
        "peak_lr": args.lr,
        "weight_decay": args.weight_decay,
        "seed": args.seed,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def train_and_store(args, device):
    """Train a model and store it in bfloat16 in args.out; returns the training report."""
    torch.manual_seed(args.seed)
    sources = read_training_files(args.stdlib)
    stream = as_tensor(b"\0".join(sources), device)
    model = LlamaForCausalLM(model_config()).to(device)
    steps, loss, seconds = train(model, stream, args)
    model.to(torch.bfloat16).save_pretrained(args.out)
    return {
        "parameters": model.num_parameters(),
        "training_files": len(sources),
        "training_bytes": len(stream),
        "steps": steps,
        "tokens": steps * args.batch * CONTEXT,
        "seconds": round(seconds, 1),
        "device": device_name(device),
        "final_train_loss_nats": round(loss, 4),
        "final_train_bits_per_byte": round(loss / math.log(2), 4),
    }


def main():
    """Train, reload what was stored, score the held-out files and write a sample."""
    args = parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    copy_held_out(args.stdlib, args.out / "heldout")
    report = settings(args) | train_and_store(args, device)
    stored = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(device).eval()
    write_sample(stored, args.out / "sample.txt")
    report["held_out_bits_per_byte"] = held_out_bits_per_byte(stored, args.out / "heldout")
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
