"""A frozen vision, asked once about each image: same losses whoever trains, and no file is stale or half."""

import json
import threading
from pathlib import Path

import pytest
import torch
from processes import python, torchrun
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scaling.data.dataset import ActionBatch
from scaling.data.episodes import demonstrations
from scaling.data.lerobot import Episode, write_folder
from scaling.engine.process import process_from_environment
from scaling.errors import UserError
from scaling.estimate.features import feature_cache
from scaling.estimate.flops import train_flops_per_token
from scaling.estimate.search import search
from scaling.estimate.time import estimate_time
from scaling.hardware import parse_gpus
from scaling.inventory import sample_length
from scaling.models.build import model_recipe
from scaling.models.vla import Vla
from scaling.profile.sinks import Memory
from scaling.rehearse import made_up, rehearse_all
from scaling.run import resolve
from scaling.run import run as run_job
from scaling.spec import Spec, load_spec
from scaling.train import main

SMALL = (
    *("model.vision.image_size=16", "model.vision.patch_size=4", "model.vision.hidden_size=32"),
    *("model.vision.intermediate_size=64", "model.vision.dropout=0.2", "model.language.num_hidden_layers=1"),
    *("batch.global_batch_size=8", "batch.gradient_accumulation_steps=2", "schedule.warmup_steps=1", "max_steps=4"),
    *('validation={"interval":10,"batches":2}', "data.validation=0.3", "checkpoint=null", "profile.interval=1"),
    *('backend={"kind":"single"}', "tracking.tensorboard=false"),
)
"""Settings of atlas-vla-tiny whose steps take milliseconds."""
FLOW = ("objective.loss=flow_matching", "model.action.head=velocity")
KEPT = "data.cache_features=true"


@pytest.fixture(scope="module")
def shown() -> list[Episode]:
    return list(demonstrations(5))


@pytest.fixture
def folder(tmp_path: Path, shown: list[Episode]) -> Path:
    write_folder(tmp_path / "data", shown, robot="simulated arm", fps=10)
    return tmp_path


def settings(folder: Path, *more: str) -> list[str]:
    return [*SMALL, f'data.train=["{folder}/data"]', f"data.cache={folder}/cache", *more]


def small(folder: Path, *more: str) -> Spec:
    return load_spec("atlas-vla-tiny", settings(folder, *more))


def trained(spec: Spec) -> tuple[list[float], list[float]]:
    """The losses of training and of validation, of one process."""
    memory = Memory()
    with process_from_environment() as process:
        run_job(resolve(spec, 1), process, [memory])
    return [step.loss for step in memory.steps], [record.loss for record in memory.validations]


def launch(folder: Path, name: str, *more: str, stop: int = 100) -> list[float]:
    """The losses in the run folder `name` after launch/train.py."""
    words = [word for setting in settings(folder, *more) for word in ("--set", setting)]
    words += ["--run-dir", str(folder / name), "--stop-after", str(stop)]
    assert main(["--spec", "atlas-vla-tiny", *words]) == 0
    return [json.loads(line)["loss"] for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def files(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob("*.features*"))


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("more", [(), ("precision=bf16", "max_steps=2", *FLOW)])
def test_losses_are_those_of_images_to_the_bit(folder: Path, more: tuple[str, ...]) -> None:
    from_images, kept = trained(small(folder, *more)), trained(small(folder, *more, KEPT))
    assert len(kept[0]) >= 2 and len(kept[1]) == 1 and kept == from_images
    assert len(files(folder)) == 1


def on_two_ranks(folder: Path, backends: dict[str, tuple[str, ...]]) -> None:
    texts = []
    for name, more in backends.items():  # each with a cache of its own, so that each asks itself
        for kept in ("false", "true"):
            spec = small(folder, *more, f"data.cache_features={kept}", f"data.cache={folder}/{name}")
            texts.append(json.dumps(spec.to_json()))
    done = torchrun(2, "tests/features_worker.py", str(folder / "out.json"), *texts)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads((folder / "out.json").read_text())
    for name, from_images, kept in zip(backends, found[::2], found[1::2], strict=True):
        assert len(kept["losses"]) == 4
        for part in ("losses", "validation"):
            assert kept[part] == pytest.approx(from_images[part], rel=1e-6, abs=0), (name, part)


def test_losses_are_the_same_on_two_ranks(folder: Path) -> None:
    on_two_ranks(
        folder,
        {
            "fsdp": ('backend={"kind":"fsdp"}',),
            "zero2": ('backend={"kind":"deepspeed","zero_stage":2}',),
            "zero3": ('backend={"kind":"deepspeed","zero_stage":3,"param_persistence_threshold":300}',),
        },
    )
    names = [path.name for path in folder.glob("*/*.features")]
    assert len(names) == 3 and len(set(names)) == 1, "whoever asks"


@pytest.mark.long
def test_losses_are_the_same_under_other_backends(folder: Path) -> None:
    on_two_ranks(
        folder,
        {
            "ddp": ('backend={"kind":"ddp"}',),
            "zero1 in bf16": ('backend={"kind":"deepspeed","zero_stage":1}', "precision=bf16"),
            "zero3 in bf16": ('backend={"kind":"deepspeed","zero_stage":3}', "precision=bf16", *FLOW),
            "fsdp in bf16": ('backend={"kind":"fsdp"}', "precision=bf16", *FLOW),
            "fsdp, checkpointing": ('backend={"kind":"fsdp"}', "activation_checkpointing=full"),
        },
    )


def test_a_run_goes_on_with_features_and_without(folder: Path) -> None:
    saves = ("max_steps=3", "validation=null", 'checkpoint={"interval":10}')
    whole = launch(folder, "whole", *saves)
    assert launch(folder, "moved", *saves, stop=1) == whole[:1]
    assert launch(folder, "moved", *saves, KEPT, stop=2) == whole[:2]
    assert launch(folder, "moved", *saves) == whole
    assert len(files(folder)) == 1


def test_the_model_takes_features_in_place_of_images(folder: Path) -> None:
    spec = small(folder)
    model = model_recipe(spec).build().requires_grad_(False).eval()
    assert isinstance(model, Vla)
    for parameter in model.parameters():
        parameter.normal_(std=0.1)
    images = torch.randint(256, (3, 2, 16, 16, 3), dtype=torch.uint8)
    told, state = torch.randint(256, (3, 24)), torch.rand(3, 6)
    passes: list[int] = []
    model.vision.register_forward_hook(lambda *_: passes.append(1))
    features = model(images)
    assert features.shape == (3, 2 * 16, 32) and passes == [1]
    actions = model(features, told, state)
    assert passes == [1], "vision is not asked again"
    assert torch.equal(actions, model(images, told, state))


# ---------------------------------------------------------------- the file


def test_another_vision_type_or_picture_is_another_file(folder: Path, shown: list[Episode]) -> None:
    base = small(folder, KEPT, "max_steps=1", "validation=null")
    trained(base)
    (first,) = files(folder)
    assert first.stat().st_size == sum(len(one.states) for one in shown) * (2 * 16 * 32 * 4 + 4)
    stamp = first.stat().st_mtime_ns
    trained(small(folder, KEPT, "max_steps=1", "validation=null", "optimizer.lr=0.1", "batch.global_batch_size=16"))
    assert files(folder) == [first] and first.stat().st_mtime_ns == stamp, "taken as it is"
    for count, change in enumerate(("seed=8", "precision=bf16", "model.vision.norm_eps=1e-3"), start=2):
        trained(small(folder, KEPT, "max_steps=1", "validation=null", change))
        assert len(files(folder)) == count, change
    # Weights from elsewhere: of the other seed, whose features are there.
    launch(folder, "other", "seed=8", "max_steps=1", "validation=null", "checkpoint={}")
    trained(small(folder, KEPT, "max_steps=1", "validation=null", f'initialize_from="{folder}/other"'))
    assert len(files(folder)) == 4
    # The same pictures in another folder, and others in this one.
    write_folder(folder / "copy", shown, robot="simulated arm", fps=10)
    trained(small(folder, KEPT, "max_steps=1", "validation=null", f'data.train=["{folder}/copy"]'))
    assert len(files(folder)) == 4
    images = {name: 255 - seen for name, seen in shown[0].images.items()}
    changed = [Episode(shown[0].instruction, shown[0].states, shown[0].actions, images), *shown[1:]]
    write_folder(folder / "changed", changed, robot="simulated arm", fps=10)
    trained(small(folder, KEPT, "max_steps=1", "validation=null", f'data.train=["{folder}/changed"]'))
    assert len(files(folder)) == 5


@pytest.mark.parametrize("harm", ["cut", "flipped"])
def test_a_harmed_file_is_made_anew(folder: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    spec = small(folder, KEPT, "max_steps=1", "validation=null")
    trained(spec)
    (path,) = files(folder)
    content = path.read_bytes()
    half = len(content) // 2
    harmed = content[:half] + (bytes([content[half] ^ 1]) + content[half + 1 :] if harm == "flipped" else b"")
    path.write_bytes(harmed)
    trained(spec)
    assert path.read_bytes() == content
    assert ("is damaged: row" in caplog.text) == (harm == "flipped")


def test_what_a_killed_run_left_is_removed(folder: Path) -> None:
    spec = small(folder, KEPT, "max_steps=1", "validation=null")
    trained(spec)
    (path,) = files(folder)
    content = path.read_bytes()
    path.rename(f"{path}.abc.tmp")
    trained(spec)
    assert files(folder) == [path] and path.read_bytes() == content


@pytest.mark.long
def test_runs_that_start_at_once_share_one_file(folder: Path) -> None:
    words = [w for s in settings(folder, KEPT, "max_steps=2") for w in ("--set", s)]
    done = []

    def start(name: str) -> None:
        run_dir = str(folder / name)
        done.append(python("launch/train.py", "--spec", "atlas-vla-tiny", "--run-dir", run_dir, *words))

    threads = [threading.Thread(target=start, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.returncode for one in done] == [0, 0], [one.stderr[-2000:] for one in done]
    assert len(files(folder)) == 1
    asked = [one for name in "ab" if "asking vision" in (one := (folder / name / "train.log").read_text())]
    assert len(asked) == 1, "the other one waited"


LIMITED = """
import resource, sys
from scaling.train import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


def test_a_full_disk_is_told_before_vision_is_asked(folder: Path) -> None:
    """A limit to the size of files stands for the disk."""
    trained(small(folder, "max_steps=1", "validation=null"))  # decodes the images, which take less
    words = [w for s in settings(folder, KEPT) for w in ("--set", s)]
    command = ["--spec", "atlas-vla-tiny", "--run-dir", str(folder / "run"), *words]
    done = python("-c", LIMITED, "200000", *command)
    assert done.returncode == 6, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("`data.cache` must be a folder with room for 3") and "File too large" in line
    assert "asking vision" not in done.stdout and files(folder) == []


# ---------------------------------------------------------------- what a user gets wrong, and knows before


def test_a_vision_that_trains_is_refused(folder: Path) -> None:
    spec = small(folder, KEPT, 'param_groups=[{"name":"all","match":["*"]}]')
    told = r"`data.cache_features` must be false where vision trains, but is true, and vision.patch_embed.weight of"
    with pytest.raises(UserError, match=told):
        resolve(spec, 1)
    with pytest.raises(UserError, match=told):
        search(spec, parse_gpus("1xH100-80GB"), 0.02)
    rules = '[{"name":"blocks","match":["vision.layers.*"],"freeze":true},{"name":"rest","match":["*"]}]'
    with pytest.raises(UserError, match=told):
        resolve(small(folder, KEPT, f"param_groups={rules}"), 1)


def test_the_size_of_the_file_is_known_before(folder: Path, shown: list[Episode]) -> None:
    spec = small(folder, KEPT, "precision=bf16")
    found, count = feature_cache(spec), sum(len(one.states) for one in shown)
    assert found is not None and found.samples == count
    trained(small(folder, KEPT, "precision=bf16", "max_steps=1", "validation=null"))
    (path,) = files(folder)
    assert found.total_bytes == path.stat().st_size
    assert feature_cache(small(folder)) is None
    absent = feature_cache(small(folder, KEPT, f"data.train=['{folder}/nowhere']".replace("'", '"')))
    assert absent is not None and absent.total_bytes is None and absent.bytes_per_sample == 2 * 16 * 32 * 4 + 4


def test_flops_are_those_of_all_but_vision(folder: Path) -> None:
    spec = small(folder, KEPT)
    model = model_recipe(spec).build()
    frozen = {name for name, _ in model.named_parameters() if name.startswith("vision.")}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    batch = made_up(spec, 2)
    assert isinstance(batch, ActionBatch) and batch.images.shape == (2, 32, 32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.train()(batch.images, batch.instruction, batch.state).sum().backward()
    length = sample_length(spec)
    have = train_flops_per_token(spec.model, length, frozen, features=True) * 2 * length
    assert have == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert have < 0.95 * train_flops_per_token(spec.model, length, frozen) * 2 * length


def test_time_is_that_of_all_but_vision(folder: Path) -> None:
    jobs = [resolve(small(folder, f"data.cache_features={kept}", "precision=bf16"), 1) for kept in ("false", "true")]
    cluster = parse_gpus("1xH100-80GB")
    images, kept = (estimate_time(job.spec, job.plan, job.groups, job.rendered, cluster).parts for job in jobs)
    assert kept["compute"] < images["compute"] and kept["optimizer"] == images["optimizer"]


BACKENDS = {
    "single": {"kind": "single"},
    "fsdp": {"kind": "fsdp"},
    "zero3": {"kind": "deepspeed", "zero_stage": 3, "reduce_bucket_size": 20_000, "param_persistence_threshold": 300},
}


def test_memory_is_that_of_a_rehearsal(folder: Path) -> None:
    cells = []
    for number, (name, backend) in enumerate(BACKENDS.items()):
        spec = small(folder, KEPT, f"backend={json.dumps(backend)}", f"precision={('fp32', 'bf16')[number % 2]}")
        path = folder / f"{name}.json"
        path.write_text(json.dumps(spec.to_json()))
        cells.append({"spec": str(path), "world_size": 1 if name == "single" else 2, "steps": 3})
    for cell, found in zip(cells, rehearse_all(cells, 3), strict=True):
        assert "error" not in found, (cell, found)
        assert found["measured_to_predicted"] == pytest.approx(1, abs=0.01), cell
