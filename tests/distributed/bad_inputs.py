"""Bad recipes, data, checkpoints, layouts and calls: a change of a folder with data and a run, a command, and
what the last line of its message must hold: the value, and behind a semicolon the cure.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


class World:
    """A folder with data, a recipe and a run of two steps; `call` runs the command line or a tool in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = folder / "run.yaml"
        self.prefix = folder / "data/text"
        self.checkpoints = folder / "runs/run/checkpoints"
        self.newest = self.checkpoints / "step_00000002"

    def change(self, name: str, value: Any) -> None:
        """Sets or, with None for a section, removes a field of the recipe."""
        tree = yaml.safe_load(self.recipe.read_text())
        section, _, field = name.partition(".")
        if not field:
            del tree[section]
        else:
            tree.setdefault(section, {})[field] = value
        self.recipe.write_text(yaml.safe_dump(tree))

    def manifest(self, **fields: Any) -> None:
        path = self.prefix.with_suffix(".json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    def fingerprint(self) -> dict[str, str]:
        return {
            str(path.relative_to(self.folder)): hashlib.blake2b(path.read_bytes()).hexdigest()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and path.name != "outcome"  # of a start that is over
        }


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def turn_into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def swap_pointers(path: Path) -> None:
    """The first two documents of an index change places."""
    raw = bytearray(path.read_bytes())
    count = struct.unpack_from("<Q", raw, 18)[0]
    start = 34 + 4 * count
    raw[start : start + 16] = raw[start + 8 : start + 16] + raw[start : start + 8]
    path.write_bytes(raw)


def tensors(world: World) -> Path:
    return max(world.newest.glob("*.distcp"), key=lambda path: path.stat().st_size)


Change = Callable[[World], Any]
NOTHING: Change = lambda world: None  # noqa: E731
NEW = "run.name=new"
TRAIN, RESUME, EVALUATE = (
    ["train", "run.yaml", NEW],
    ["train", "run.yaml", "--resume"],
    ["evaluate", "run.yaml"],
)
SAMPLE, SHOW = ["sample", "run.yaml"], ["show-config", "run.yaml"]


def field(name: str, value: Any) -> Change:
    return lambda world: world.change(name, value)


CASES: dict[str, tuple[Change, list[str], list[str]]] = {
    # recipes
    "no recipe": (NOTHING, ["train", "none.yaml"], ["none.yaml", "No such file", "give the path"]),
    "not yaml": (
        lambda w: w.recipe.write_text("run: {"),
        TRAIN,
        ["run.yaml", "not a recipe in YAML", "line 1, column 7", "; "],
    ),
    "not a mapping": (lambda w: w.recipe.write_text("[1]"), TRAIN, ["run.yaml", "section"]),
    "empty recipe": (lambda w: w.recipe.write_text(""), TRAIN, ["run.yaml"]),
    "unknown field": (field("model.num_layer", 3), TRAIN, ["model.num_layer", "did you mean 'num_layers'"]),
    "unknown section": (field("optimiser.lr", 3), TRAIN, ["optimiser", "did you mean 'optimizer'"]),
    "no section": (field("optimizer", None), TRAIN, ["optimizer", "required", "; add it"]),
    "wrong choice": (field("diffusion.schedule", "loglinaer"), TRAIN, ["loglinaer", "'loglinear'"]),
    "text for a number": (field("train.num_steps", "ten"), TRAIN, ["train.num_steps", "'ten'", "integer"]),
    "out of range": (field("diffusion.uniform_ratio", 1.5), TRAIN, ["uniform_ratio", "1.5", "less than"]),
    "not finite": (field("optimizer.lr", float("nan")), TRAIN, ["optimizer.lr", "nan"]),
    "override without a value": (NOTHING, [*TRAIN, "train.num_steps"], ["train.num_steps", "write it as"]),
    "override of nothing": (NOTHING, [*TRAIN, "train.steps=3"], ["train.steps", "did you mean"]),
    "heads": (
        field("model.num_attention_heads", 5),
        TRAIN,
        ["num_attention_heads=5", "num_query_groups=2", "; change one"],
    ),
    "warm-up": (field("lr_schedule.warmup_steps", 9), TRAIN, ["warmup_steps=9", "num_steps=9", "; shorten"]),
    "unknown Megatron field": (field("model.mcore", {"moe": 1}), TRAIN, ["model.mcore.moe", "no such field"]),
    "owned Megatron field": (
        field("model.mcore", {"bf16": True}),
        TRAIN,
        ["mcore.bf16", "set precision.dtype"],
    ),
    "time without documents": (
        field("diffusion.time_per", "document"),
        TRAIN,
        ["time_per=document", "packing=stream", "; take"],
    ),
    "kernels without a GPU": (
        field("train.kernels", "cuda"),
        [*TRAIN, "run.name=other"],
        ["train.kernels=cuda cannot be had on cpu", "no GPU here", "; or let train.kernels be auto"],
    ),
    # layouts
    "too few processes": (
        NOTHING,
        [*TRAIN, "parallel.tensor_model_parallel_size=2"],
        ["world size 1", "= 2", "; start 2 or 4"],
    ),
    "heads over ranks": (
        NOTHING,
        [*SHOW, "parallel.tensor_model_parallel_size=8"],
        ["tensor_model_parallel_size=8", "; change"],
    ),
    "layers over stages": (
        NOTHING,
        [*SHOW, "parallel.pipeline_model_parallel_size=3"],
        ["num_layers=4", "3 pipeline chunks", "; "],
    ),
    "interleaving one stage": (
        NOTHING,
        [*SHOW, "parallel.virtual_pipeline_model_parallel_size=2"],
        ["no effect", "; remove it"],
    ),
    "sequence parallel alone": (
        NOTHING,
        [*SHOW, "parallel.sequence_parallel=true"],
        ["no effect", "; turn it off"],
    ),
    "sequence over ranks": (
        NOTHING,
        [*SHOW, "parallel.context_parallel_size=3"],
        ["seq_length=32", "3 slices", "; change"],
    ),
    "batch over ranks": (
        NOTHING,
        [*SHOW, "--world-size", "3"],
        ["global_batch_size=2", "2 * 3 = 6", "; nearest: 6"],
    ),
    # data
    "no manifest": (
        lambda w: w.prefix.with_suffix(".json").unlink(),
        TRAIN,
        ["text.json", "; is the prefix"],
    ),
    "manifest cut": (
        lambda w: cut(w.prefix.with_suffix(".json"), 50),
        TRAIN,
        ["text.json", "; make it again"],
    ),
    "no bin": (lambda w: w.prefix.with_suffix(".bin").unlink(), TRAIN, ["text.bin", "no such file", "; "]),
    "bin cut": (
        lambda w: cut(w.prefix.with_suffix(".bin"), 999),
        TRAIN,
        ["is cut short: 999 bytes", "; make"],
    ),
    "index cut": (
        lambda w: cut(w.prefix.with_suffix(".idx"), 99),
        TRAIN,
        ["is cut short: 99 bytes", "; make"],
    ),
    "index header cut": (
        lambda w: cut(w.prefix.with_suffix(".idx"), 20),
        TRAIN,
        ["20 bytes of a header", "; "],
    ),
    "no index": (
        lambda w: w.prefix.with_suffix(".idx").write_bytes(b"PK" * 99),
        TRAIN,
        ["begins with", "; make"],
    ),
    "index out of order": (
        lambda w: swap_pointers(w.prefix.with_suffix(".idx")),
        TRAIN,
        ["out of order", "; "],
    ),
    "other vocabulary": (
        lambda w: w.manifest(vocab_size=9),
        TRAIN,
        ["vocab_size=400", "must be 9", "; correct"],
    ),
    "other mask": (field("data.mask_id", 3), TRAIN, ["data.mask_id=3", "must be 2", "; correct"]),
    "no tokenizer": (
        field("data.tokenizer", "no.model"),
        TRAIN,
        ["tokenizer=no.model", "; give the tokenizer"],
    ),
    "other tokenizer": (
        lambda w: flip(w.folder / "data/tokenizer.model"),
        TRAIN,
        ["is not the file that made", "; give that"],
    ),
    "sample too long": (
        field("data.seq_length", 10**6),
        TRAIN,
        ["seq_length=1000000", "; take a seq_length"],
    ),
    "no prompts": (field("data.clean_prompts", True), TRAIN, ["clean_prompts=true", "; preprocess with"]),
    "no held-out set": (field("data.valid_prefix", None), EVALUATE, ["valid_prefix is null", "; set it"]),
    # checkpoints and run folders
    "run exists": (NOTHING, ["train", "run.yaml"], ["runs/run holds a run", "; add --resume"]),
    "nothing to resume": (NOTHING, [*TRAIN, "--resume"], ["runs/new holds no run", "; leave --resume out"]),
    "fallback alone": (NOTHING, [*TRAIN, "--allow-fallback"], ["without --resume", "; add it"]),
    "other maths": (NOTHING, [*RESUME, "diffusion.uniform_ratio=0.5"], ["uniform_ratio: was 0.1, now 0.5"]),
    "other data": (
        NOTHING,
        [*RESUME, "data.train_prefix=data/text_valid"],
        ["was data/text (", "now data/text_v"],
    ),
    "pointer to nothing": (
        lambda w: (w.checkpoints / "latest").write_text("step_00000077\n"),
        RESUME,
        ["step_00000077", "; correct"],
    ),
    "pointer to no step": (
        lambda w: (w.checkpoints / "latest").write_text("last\n"),
        RESUME,
        ["latest says 'last'", "; write", "there: step_00000001, step_00000002"],
    ),
    "empty pointer": (
        lambda w: (w.checkpoints / "latest").write_text(""),
        [*RESUME, "--allow-fallback"],
        ["latest says ''", "; write"],
    ),
    "junk for a pointer": (
        lambda w: (w.checkpoints / "latest").write_bytes(bytes(range(256))),
        SAMPLE,
        ["latest says '", "; write"],
    ),
    "folder for a pointer": (
        lambda w: turn_into_folder(w.checkpoints / "latest"),
        RESUME,
        ["latest cannot be read (Is a directory)", "; correct its permissions, or make it a file"],
    ),
    "tensor file flipped": (
        lambda w: flip(tensors(w)),
        RESUME,
        ["is damaged", "checksum", "--allow-fallback"],
    ),
    "tensor file cut": (lambda w: cut(tensors(w), 9), RESUME, ["is damaged", "9 bytes", "--allow-fallback"]),
    "tensor file gone": (
        lambda w: tensors(w).unlink(),
        RESUME,
        ["is damaged", ".distcp", "--allow-fallback"],
    ),
    "checksums gone": (
        lambda w: (w.newest / "manifest.json").unlink(),
        RESUME,
        ["is damaged", "manifest.json", "--write-manifest"],
    ),
    "no checkpoint": (NOTHING, [*EVALUATE, NEW], ["has no checkpoint yet", "; train first"]),
    "not a checkpoint": (NOTHING, [*SAMPLE, "--checkpoint", "data"], ["data is not a checkpoint", "; "]),
    "another model": (NOTHING, [*SAMPLE, "model.hidden_size=64"], ["hidden_size=32", "; "]),
    # calls
    "unknown verb": (NOTHING, ["tarin", "run.yaml"], ["invalid choice: 'tarin'"]),
    "prompt too long": (
        NOTHING,
        [*SAMPLE, "--prompt", "to be " * 99],
        ["data.seq_length is 32", "; shorten them"],
    ),
    "no steps": (NOTHING, [*SAMPLE, "--steps", "0"], ["--steps", "at least 1", "'0'"]),
    "negative heat": (NOTHING, [*SAMPLE, "--temperature", "-1"], ["--temperature", "at least 0", "'-1'"]),
    # tools
    "no input": (
        NOTHING,
        ["preprocess_data", "--input", "no.jsonl", "--tokenizer", "data/tokenizer.model", "--output", "o/x"],
        ["no.jsonl", "no such file", "; give files"],
    ),
    "unknown input": (
        NOTHING,
        ["preprocess_data", "--input", "run.yaml", "--tokenizer", "data/tokenizer.model", "--output", "o/x"],
        ["run.yaml", "unknown kind of file", "; its name must end in"],
    ),
    "dataset exists": (
        NOTHING,
        [
            "preprocess_data",
            "--input",
            "data/text.jsonl",
            "--tokenizer",
            "data/tokenizer.model",
            "--output",
            "data/text",
        ],
        ["data/text.bin exists already", "; give --overwrite"],
    ),
    "no documents": (
        lambda w: (w.folder / "bad.jsonl").write_text("[]\n{}\n"),
        ["preprocess_data", "--input", "bad.jsonl", "--tokenizer", "data/tokenizer.model", "--output", "o/x"],
        ["no document found in bad.jsonl", "not a JSON object", "no key 'text'"],
    ),
    "no such step": (
        NOTHING,
        ["show_batch", "run.yaml", "--step", "10"],
        ["step 10", "; choose one of 1 to"],
    ),
    "no run to inspect": (NOTHING, ["inspect_checkpoint", "nowhere"], ["nowhere", "; "]),
    "no runs to compare": (NOTHING, ["compare_runs", "runs/run", "nowhere"], ["nowhere", "; "]),
}
