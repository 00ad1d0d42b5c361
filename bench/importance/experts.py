"""Which scores of experts lose least: half of the experts of a small trained model cut by each.

    python -m bench.importance.experts --steps 600

A Mixtral of four layers with eight experts each, two a token, is trained on the bytes of Wikipedia leads; then four
experts of every layer go, by each width metric of `METRICS` and by REAP. Prints Markdown: LM loss in nats a byte on
validation windows of the training text right after the cut. Models and runs are kept in --run-dir, and a second call
goes on from there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from bench.common.teacher import ASSETS
from compactlm_nemo.data.bundled import WIKI_HELDOUT, WIKI_TRAIN, fetch_bundled

RESULTS = Path(__file__).parents[1] / "results" / "experts.json"
METRICS = ("l2_mean", "mean_mean", "mean_l2", "l2_l2")
KEPT = 4
END = "<|end|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="training steps of 16 windows of 128 bytes")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows of 128 bytes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the model and its training")
    parser.add_argument("--run-dir", default="runs/bench_experts", help="folder of the models and runs; it is kept")
    args = parser.parse_args()
    fetch_bundled(ASSETS)
    losses: dict[str, list[float]] = {}
    for seed in args.seeds:
        folder = Path(args.run_dir) / str(seed)
        if not (folder / "model" / "model.safetensors").is_file():
            train(folder / "model", seed, args.steps)
        for way, loss in measured(folder, args.samples).items():
            losses.setdefault(way, []).append(loss)
    RESULTS.write_text(json.dumps({"arguments": vars(args), "losses": losses}, indent=1) + "\n")
    print(f"| experts kept by | {' | '.join(f'seed {seed}' for seed in args.seeds)} |")
    print("|---" * (1 + len(args.seeds)) + "|")
    for way, found in losses.items():
        print(f"| {way} | {' | '.join(f'{loss:.4f}' for loss in found)} |")


def train(folder: Path, seed: int, steps: int) -> None:
    """Train the model on windows of the text's bytes, and save it with a tokenizer of bytes."""
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=257, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=512,
        output_router_logits=True, router_aux_loss_coef=0.01, tie_word_embeddings=False,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({letter: number for number, letter in enumerate([*letters, END])}, []))
    bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token=END)
    texts = [json.loads(line)["text"] for line in (ASSETS / WIKI_TRAIN).read_text(encoding="utf-8").splitlines()]
    ids_N = torch.tensor([number for ids in tokenizer(texts[:2000])["input_ids"] for number in [*ids, 256]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        starts = torch.randint(len(ids_N) - 128, (16,)).tolist()
        windows_BS = torch.stack([ids_N[start : start + 128] for start in starts])
        loss = model(windows_BS, labels=windows_BS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"seed {seed}, step {step}: {loss.item():.3f}", file=sys.stderr, flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measured(folder: Path, samples: int) -> dict[str, float]:
    """Cut by each way; return the losses before (`all experts`) and after."""
    common = [
        f"model.source={folder / 'model'}", "model.precision=fp32", f"data.train.wiki={ASSETS / WIKI_TRAIN}",
        f"data.heldout.wiki={ASSETS / WIKI_HELDOUT}", "data.sequence_length=128", f"score.samples={samples}",
        f"score.width=[{','.join(METRICS)}]", f"search.experts=[{KEPT}]", "prune.samples=128",
    ]  # fmt: skip
    losses: dict[str, float] = {}
    for way in (*METRICS, "reap"):
        words = [*common, f"run.dir={folder / way}", f"run.reuse={folder}"]
        words += [f"search.width={way}"] if way in METRICS else ["search.experts_by=reap"]
        for recipe in ("import_model", "tokenize", "score", "search", "prune"):
            subprocess.run([sys.executable, "-m", f"recipes.{recipe}", *words], check=True, stdout=sys.stderr)
        results = json.loads((folder / way / "student" / "manifest.json").read_text())["results"]
        losses |= {"all experts": results["loss_before"], way: results["loss_after"]}
    return losses


if __name__ == "__main__":
    main()
