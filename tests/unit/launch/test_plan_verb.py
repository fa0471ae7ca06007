"""`plan` as a user runs it, and its search against brute force."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from xdlm_megatron.__main__ import main
from xdlm_megatron.config.derive import derive
from xdlm_megatron.config.load import load_recipe
from xdlm_megatron.launch.gpus import GIB, GPUS
from xdlm_megatron.launch.layout import RECOMPUTES, Layout, Shape, all_layouts, recipe_layout
from xdlm_megatron.launch.plan import choose_gpu, make_plan, price

REPOSITORY = Path(__file__).parents[3]
RECIPE = """
run: {name: eight}
model:
  {num_layers: 32, hidden_size: 4096, ffn_hidden_size: 12288, num_attention_heads: 32, num_query_groups: 8}
parallel: {tensor_model_parallel_size: 4, sequence_parallel: true}
precision: {dtype: bfloat16}
data: {train_prefix: a, tokenizer: a, seq_length: 4096, vocab_size: 126464, mask_id: 126336}
optimizer: {lr: 4e-4}
lr_schedule: {kind: constant}
train: {num_steps: 400000, micro_batch_size: 1, global_batch_size: 1024}
"""


@pytest.fixture
def eight(tmp_path: Path) -> Path:
    path = tmp_path / "eight.yaml"
    path.write_text(RECIPE)
    return path


def plan_json(capfd: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    tree: dict[str, Any] = json.loads(capfd.readouterr().out)
    return tree


def test_the_table_tells_memory_time_and_layouts(eight: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(eight), "--gpus", "64", "--top", "3"]) == 0
    said = capfd.readouterr().out
    assert said.startswith("eight on 64 x h100: 79.1 GiB, 989 TFLOP/s in bfloat16")
    for part in ("weights", "gradients", "optimizer", "ema", "activations", "head and loss", "total"):
        assert f"    {part} " in said
    assert "recompute none; by choice: none " in said
    assert "fuse_head auto; fused " in said
    assert "the recipe's layout: tensor 4 with sequence parallelism, pipeline 1" in said
    assert "predicted: MFU " in said
    assert "layouts that fit, fastest first" in said
    assert "assumed:" in said
    assert max(map(len, said.split("use the first with:")[0].splitlines())) < 140


def test_what_does_not_fit_says_by_how_much(eight: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(eight), "--gpu", "a100-40", "--gpus", "4"]) == 0
    said = capfd.readouterr().out
    assert "DOES NOT FIT: " in said
    assert "NOTHING FITS of " in said
    config, gpu = load_recipe(eight), GPUS["a100-40"]
    shape = Shape.of(config)
    least = min(price(shape, layout, gpu).memory.total for layout in all_layouts(shape, 4, 8, "auto"))
    assert f"it needs {least / GIB:.1f} GiB, {(least - gpu.memory) / GIB:.1f} more than there are" in said
    assert (
        main(["plan", str(eight), "--gpu", "a100-40", "--gpus", "4", "--gpu-memory", f"{least / GIB + 1}"])
        == 0
    )
    assert "NOTHING FITS" not in capfd.readouterr().out


def test_a_recipe_for_other_numbers_of_gpus(eight: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(eight), "--gpus", "6"]) == 0
    said = capfd.readouterr().out
    assert "the recipe's own layout does not fit these GPUs: world size 6 must be a multiple of" in said
    assert "no layout divides: 6 GPUs against 32 layers, 32 heads, 8 key/value heads" in said


@pytest.mark.parametrize("gpus", [8, 24, 512])
def test_every_layout_it_names_is_a_recipe(eight: Path, capfd: pytest.CaptureFixture[str], gpus: int) -> None:
    overrides = ["train.global_batch_size=3072"]
    ranked = plan_json(capfd, eight, *overrides, "--gpus", gpus, "--top", 30)["ranked"]
    assert ranked
    for found in ranked:
        config = load_recipe(eight, [*overrides, *found["overrides"]])
        derived = derive(config, gpus)  # raises where a size does not divide
        assert derived.data_parallel_size == found["layout"]["dp"]
        assert recipe_layout(config, gpus) == Layout(
            **{name: value for name, value in found["layout"].items() if name != "dp"}
        )
        assert found["fits"]
        assert found["memory_bytes"]["total"] <= GPUS["h100"].memory


def test_the_search_leaves_nothing_out(eight: Path) -> None:
    config, gpu = load_recipe(eight, ["train.global_batch_size=32"]), GPUS["h100"]
    shape = Shape.of(config)
    found = set()
    powers = [1, 2, 4, 8, 16, 32]
    for tp, pp, cp, micro, vpp in itertools.product(powers, repeat=5):
        if tp > 8 or 16 % (tp * pp * cp) or vpp > 8:
            continue
        dp = 16 // (tp * pp * cp)
        microbatches, rest = divmod(32, micro * dp)
        if rest or 32 % (pp * vpp) or (vpp > 1 and (pp == 1 or microbatches % pp)):
            continue
        for recompute in RECOMPUTES:
            found.add(Layout(16, tp, pp, vpp, cp, tp > 1, micro, recompute))
    tried = list(all_layouts(shape, 16, 8, fuse_head="auto"))
    assert set(tried) == found
    assert len(tried) == len(found)
    best = min((c for c in (price(shape, layout, gpu) for layout in found) if c.fits), key=lambda c: c.cost)
    assert make_plan(config, gpu, 16).ranked[0].cost == best.cost


def test_thousands_of_gpus_take_seconds(eight: Path) -> None:
    config = load_recipe(eight, ["train.global_batch_size=12288"])
    start = time.process_time()
    plan = make_plan(config, GPUS["h100"], 6144)
    assert time.process_time() - start < 10
    assert plan.num_tried > 3000
    assert plan.ranked


@pytest.mark.parametrize("size", ["160m", "400m", "1b", "3b", "8b"])
def test_the_ladder_fits_the_nodes_that_its_script_asks_for(size: str) -> None:
    script = (REPOSITORY / f"slurm/pretrain_{size}.sh").read_text()
    world = 8 * int(script.split("--nodes=")[-1].split()[0])
    config = load_recipe(REPOSITORY / f"examples/xdlm_{size}.yaml")
    own = make_plan(config, GPUS["h100"], world).recipe
    assert not isinstance(own, str), own
    assert own.fits
    assert 0.1 < own.step.mfu < 0.6


def test_a_growing_batch_divides_at_every_size(eight: Path, capfd: pytest.CaptureFixture[str]) -> None:
    overrides = ["train.rampup_batch_size=[256,96,100000]"]
    ranked = plan_json(capfd, eight, *overrides, "--gpus", 64, "--top", 30)["ranked"]
    assert {found["layout"]["dp"] for found in ranked} <= {1, 2, 4, 8, 16, 32}  # 32 divides 256 and 96
    for found in ranked:
        config = load_recipe(eight, [*overrides, *found["overrides"]])
        derived = derive(config, 64)
        days = derived.total_tokens / found["step"]["tokens_per_second"] / 86400
        assert found["step"]["days"] == pytest.approx(days)


@pytest.mark.parametrize(
    ("mcore", "recompute", "notes"),
    [
        ("{recompute_granularity: full, recompute_method: uniform, recompute_num_layers: 1}", "full", []),
        ("{recompute_granularity: selective, recompute_modules: [mlp]}", "mlp", []),
        (
            "{recompute_granularity: selective, recompute_modules: [core_attn]}",
            "none",
            ["model.mcore.recompute_modules=['core_attn'] is planned as recompute none"],
        ),
        (
            "{recompute_granularity: full, recompute_method: block, recompute_num_layers: 4}",
            "full",
            [
                "model.mcore.recompute_method=block is planned as recompute full",
                "model.mcore.recompute_num_layers=4 is planned as recompute full",
            ],
        ),
        (
            "{cpu_offloading: true, cpu_offloading_num_layers: 1}",
            "none",
            [
                "model.mcore.cpu_offloading=True is not priced",
                "model.mcore.cpu_offloading_num_layers=1 is not priced",
            ],
        ),
    ],
)
def test_fields_of_megatron_are_planned_or_named(
    eight: Path, capfd: pytest.CaptureFixture[str], mcore: str, recompute: str, notes: list[str]
) -> None:
    tree = plan_json(capfd, eight, f"model.mcore={mcore}", "--gpus", 8, "--top", 1)
    assert tree["recipe"]["layout"]["recompute"] == recompute
    assert tree["notes"] == notes
    assert main(["plan", str(eight), f"model.mcore={mcore}", "--gpus", "8", "--top", "1"]) == 0
    said = capfd.readouterr().out
    assert [line.removeprefix("  note: ") for line in said.splitlines() if "  note: " in line] == notes


def test_json_adds_up(eight: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tree = plan_json(capfd, eight, "--gpus", 64)
    own = tree["recipe"]
    memory = own["memory_bytes"]
    total = memory.pop("total")
    assert total == pytest.approx(sum(memory.values()))
    assert own["spare_bytes"] == pytest.approx(tree["gpu"]["memory"] - total)
    seconds = own["step"]["seconds"]
    assert own["step"]["seconds_total"] == pytest.approx(sum(seconds.values()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h300"], "--gpu h300: no such GPU type here; choose a100-40, a100, h100"),
        (["--gpus", "0"], "--gpus: must be a whole number of at least 1"),
        (["--gpu-memory", "-3"], "--gpu-memory: must be a positive number of GiB"),
        (["model.num_layer=3"], "did you mean 'num_layers'?"),
    ],
)
def test_mistakes_of_plan(
    eight: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    try:
        status = main(["plan", str(eight), *arguments])
    except SystemExit as stop:
        status = stop.code
    said = capfd.readouterr().err
    assert status == 2
    assert message in said


def test_gpu_memory_can_be_given() -> None:
    assert choose_gpu("h100", 64).memory == 64 * GIB
    assert choose_gpu("h100", None) is GPUS["h100"]


def test_a_plan_imports_nothing_heavy(eight: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys\nfrom xdlm_megatron.__main__ import main\n"
            f"assert main(['plan', {str(eight)!r}]) == 0\n"
            "print('heavy:', [m for m in ('torch', 'megatron', 'numpy', 'mlflow') if m in sys.modules])",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize(("size", "world"), [("1b", 16), ("8b", 128)])
def test_fp8_fits_and_is_predicted_faster(size: str, world: int) -> None:
    plans = [
        make_plan(load_recipe(REPOSITORY / f"examples/xdlm_{size}{kind}.yaml"), GPUS["h100"], world)
        for kind in ("", "_fp8")
    ]
    plain, fp8 = (plan.recipe for plan in plans)
    assert fp8.fits
    assert 1.1 < fp8.step.tokens_per_second / plain.step.tokens_per_second < 2
    for found in plans[1].ranked:  # what the search proposes loads
        load_recipe(REPOSITORY / f"examples/xdlm_{size}_fp8.yaml", found.layout.overrides())


def test_fp8_on_a_gpu_without_it_is_refused() -> None:
    config = load_recipe(REPOSITORY / "examples/xdlm_1b_fp8.yaml")
    with pytest.raises(
        ValueError, match=r"precision\.fp8=hybrid: GPUs of type a100 have none; set it to null"
    ):
        make_plan(config, GPUS["a100"], 16)
