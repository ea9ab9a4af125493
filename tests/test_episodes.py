"""Demonstrations of robots: the simulated arm, folders in LeRobot's layout, samples of them, and policies that act."""

import json
from pathlib import Path

import av
import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch
from processes import python
from torch import nn

from scaling.data import arm
from scaling.data.episodes import ARM_PIXELS, demonstrations, open_episode_data
from scaling.data.lerobot import INFO, Episode, Folder, write_folder
from scaling.errors import UserError
from scaling.rollout import Policy, roll_out, wilson
from scaling.spec import change_spec, load_spec
from scaling.spec.sections import EpisodeData

SPEC = load_spec("atlas-vla-tiny")
MODEL = SPEC.model


def section(folder: Path, **fields) -> EpisodeData:
    defaults = {"train": [str(folder / "data")], "validation": 0, "sequence_length": 24}
    return EpisodeData(kind="episodes", cache=str(folder / "cache"), **(defaults | fields))


@pytest.fixture(scope="module")
def shown() -> list[Episode]:
    return list(demonstrations(6))


@pytest.fixture
def folder(tmp_path, shown) -> Path:
    write_folder(tmp_path / "data", shown, robot="simulated arm", fps=10)
    return tmp_path


# ---------------------------------------------------------------- the simulated arm


def test_a_table_is_a_function_of_its_seed_and_number():
    some, again = arm.start(3, np.arange(20)), arm.start(3, np.array([7, 19]))
    assert np.array_equal(some.tip[[7, 19]], again.tip) and np.array_equal(some.discs[[7, 19]], again.discs)
    assert not np.allclose(some.tip, arm.start(4, np.arange(20)).tip)
    assert arm.instructions(some)[7] == arm.instructions(again)[0]
    apart = np.linalg.norm(some.discs - some.tip[:, None], axis=2)
    assert apart.min() >= 0.4 and not arm.reached(some).any(), "nobody is there from the start"
    assert len(set(arm.instructions(arm.start(3, np.arange(100))))) == len(arm.COLOURS)


def test_the_demonstrator_arrives_and_standing_still_does_not():
    tables = arm.start(5, np.arange(200))
    still = tables
    for _ in range(arm.MOST_STEPS // 2):
        tables, still = arm.move(tables, arm.demonstrate(tables)), arm.move(still, np.zeros((200, 2)))
    assert arm.reached(tables).all() and not arm.reached(still).any()
    assert np.linalg.norm(tables.tip, axis=1).max() <= 1.0


def test_cameras_see_the_discs_where_they_are():
    tables, size = arm.start(5, np.arange(8)), 64
    seen = arm.pictures(tables, size)
    assert seen.shape == (8, 2, size, size, 3) and seen.dtype == np.uint8
    palette = list(arm.COLOURS.values())
    for table in range(8):
        for disc, colour in zip(tables.discs[table], tables.colours[table], strict=True):
            column, row = int((disc[0] + 1) / 2 * size), int((1 - disc[1]) / 2 * size)
            assert tuple(seen[table, 0, row, column]) == palette[colour]
    wrist = seen[:, 1, size // 2, size // 2].astype(int)
    assert wrist.max() < 60, "the tip is in the middle of the wrist's picture"


def test_the_arm_ends_where_its_joints_say():
    tables = arm.start(5, np.arange(50))
    x, y, cos1, sin1, cos2, sin2 = arm.state(tables).T.astype(float)
    first, second = np.arctan2(sin1, cos1), np.arctan2(sin2, cos2)
    assert np.allclose(0.5 * np.cos(first) + 0.5 * np.cos(first + second), x, atol=1e-5)
    assert np.allclose(0.5 * np.sin(first) + 0.5 * np.sin(first + second), y, atol=1e-5)


# ---------------------------------------------------------------- folders


def test_what_is_written_is_read(folder, shown):
    dataset, held_out = open_episode_data(section(folder, normalization="none"), MODEL)
    assert held_out is None and len(dataset) == sum(len(one.states) for one in shown)
    batch = dataset.read(np.arange(len(dataset)))
    place = 0
    for episode in shown:
        count = len(episode.states)
        assert np.array_equal(batch.state[place : place + count], episode.states)
        assert np.array_equal(batch.actions[place : place + count, 0], episode.actions)
        text = bytes(batch.instruction[place].to(torch.uint8).tolist())
        assert text == episode.instruction.encode().ljust(24, b"\0")
        for moment in range(count):
            left = count - moment
            assert batch.action_is_pad[place + moment].tolist() == [step >= left for step in range(8)]
            last = min(count - 1, moment + 7)
            assert np.array_equal(batch.actions[place + moment, last - moment], episode.actions[last])
        place += count
    # By name the overhead view comes first; 64 pixels are made 32.
    means = [batch.images[0, view].float().mean() for view in range(2)]
    wanted = [shown[0].images[name][0].mean() for name in sorted(arm.CAMERAS)]
    assert np.allclose(means, wanted, atol=1.5)


def test_sizes_that_the_model_has_are_not_changed(folder, shown):
    vision = MODEL.vision.model_copy(update={"image_size": ARM_PIXELS})
    data = section(folder, cameras=["wrist", "observation.images.overhead"])
    dataset, _ = open_episode_data(data, MODEL.model_copy(update={"vision": vision}))
    images = dataset.read(np.array([0])).images[0].numpy()
    assert np.array_equal(images[0], shown[0].images["wrist"][0])
    assert np.array_equal(images[1], shown[0].images["overhead"][0])


def as_version_3(folder: Path) -> None:
    """One file for all episodes, whose rows are out of order, and the instructions as pandas writes them."""
    files = sorted(folder.glob("data/**/*.parquet"))
    table = arrow.concat_tables([parquet.read_table(file) for file in reversed(files)])
    for file in files:
        file.unlink()
    parquet.write_table(table, folder / "data" / "chunk-000" / "file-000.parquet")
    lines = [json.loads(line) for line in (folder / "meta/tasks.jsonl").read_text().splitlines()]
    columns = {
        "task_index": [line["task_index"] for line in lines],
        "__index_level_0__": [line["task"] for line in lines],
    }
    parquet.write_table(arrow.table(columns), folder / "meta/tasks.parquet")
    (folder / "meta/tasks.jsonl").unlink()
    info = json.loads((folder / INFO).read_text()) | {"codebase_version": "v3.0"}
    (folder / INFO).write_text(json.dumps(info))


def test_version_3_holds_the_same(folder):
    before, _ = open_episode_data(section(folder), MODEL)
    as_version_3(folder / "data")
    after, _ = open_episode_data(section(folder), MODEL)
    assert after.fingerprint == before.fingerprint
    every = np.arange(len(before))
    for name, tensor in vars(before.read(every)).items():
        assert torch.equal(tensor, getattr(after.read(every), name)), name


def as_video(folder: Path, version: str) -> None:
    """Images of one camera moved to a video: of each episode, or of all in turn."""
    info = json.loads((folder / INFO).read_text())
    name = "observation.images.wrist"
    info["features"][name]["dtype"] = "video"
    info["codebase_version"] = version
    old = version.startswith("v2")
    info["video_path"] = (
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        if old
        else "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    )
    places, frames, begins = [], [], 0
    for number, file in enumerate(sorted(folder.glob("data/**/*.parquet"))):
        table = parquet.read_table(file)
        own = [value["bytes"] for value in table.column(name).to_pylist()]
        parquet.write_table(table.drop_columns([name]), file)
        places.append({"episode_index": number, "begins": begins / 10})
        begins += len(own)
        frames.append(own)
    if not old:
        frames = [[one for own in frames for one in own]]
    for number, own in enumerate(frames):
        numbers = {"episode_chunk": 0, "episode_index": number, "chunk_index": 0, "file_index": 0}
        path = info["video_path"].format(video_key=name, **numbers)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        _write_video(folder / path, own)
    if not old:
        columns = {
            "episode_index": [one["episode_index"] for one in places],
            f"videos/{name}/chunk_index": [0] * len(places),
            f"videos/{name}/file_index": [0] * len(places),
            f"videos/{name}/from_timestamp": [one["begins"] for one in places],
        }
        (folder / "meta/episodes/chunk-000").mkdir(parents=True)
        parquet.write_table(arrow.table(columns), folder / "meta/episodes/chunk-000/file-000.parquet")
    (folder / INFO).write_text(json.dumps(info))


def _write_video(path: Path, frames: list[bytes]) -> None:
    import io

    from PIL import Image

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 64, "yuv420p", 4_000_000
        for content in frames:
            image = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_frames_of_videos_stand_beside_their_moments(folder, version):
    before, _ = open_episode_data(section(folder), MODEL)
    every = np.arange(len(before))
    wanted = before.read(every).images.float()
    as_video(folder / "data", version)
    found = open_episode_data(section(folder), MODEL)[0].read(every).images.float()
    assert torch.equal(found[:, 0], wanted[:, 0])
    off = (found[:, 1] - wanted[:, 1]).abs().mean(dim=(1, 2, 3))
    assert off.max() < 8, "as good as the coding"
    shifted = (found[:-1, 1] - wanted[1:, 1]).abs().mean(dim=(1, 2, 3))
    assert shifted.mean() > 2 * off.mean(), "and no frame is another's"


def change(folder: Path, name: str, to, episode: int = 1, row: int | None = 2) -> None:
    """Write another value into a column of one episode."""
    file = sorted(folder.glob("data/data/**/*.parquet"))[episode]
    table = parquet.read_table(file)
    values = table.column(name).to_pylist()
    values = [to if row in (None, n) else value for n, value in enumerate(values)]
    column = arrow.array(values, type=table.schema.field(name).type)
    parquet.write_table(table.set_column(table.schema.get_field_index(name), name, column), file)


def png(height: int, width: int) -> dict:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


CAMERA = "observation.images.wrist"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("action", [0.0, float("nan")], r"episode_000001.parquet: episode 1, moment 2: `action` must be finite"),
        ("observation.state", [float("inf")] * 6, r"episode 1, moment 2: `observation.state` must be finite"),
        ("frame_index", 7, r"episode 1: `frame_index` must count from 0 without a gap"),
        ("task_index", 99, r"episode 1: `task_index` must be one that meta/ has an instruction for, but is 99"),
        (CAMERA, png(20, 64), r"episode_000001.parquet: row 2: `observation.images.wrist` must be 64 x 64 pixels"),
        (CAMERA, {"bytes": b"no image", "path": None}, r"row 2: `observation.images.wrist` must be an image"),
        (CAMERA, None, r"row 2: `observation.images.wrist` must be an image, but is none"),
        (CAMERA, {"bytes": None, "path": "../../secret.png"}, r"row 2: .* must lie in the data folder"),
    ],
)
def test_a_malformed_episode_is_named_or_left_out_and_counted(folder, shown, caplog, name, value, told):
    change(folder, name, value)
    with pytest.raises(UserError, match=told):
        open_episode_data(section(folder), MODEL)
    dataset, _ = open_episode_data(section(folder, malformed="skip"), MODEL)
    assert len(dataset) == sum(len(one.states) for n, one in enumerate(shown) if n != 1)
    assert "1 episodes of" in caplog.text and "are left out" in caplog.text
    assert torch.isfinite(dataset.read(np.arange(len(dataset))).actions).all()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"train": ["nowhere"]}, "`data.train` must name folders of demonstrations"),
        ({"cameras": ["wrist"]}, "`model.vision.views` must be 1"),
        ({"cameras": ["wrist", "front"]}, "`data.cameras` must name cameras of .* but front is none; there are"),
        ({"state": "action"}, "`model.action.state_dim` must be 2"),
        ({"state": "effort"}, "must have the columns effort, .* but has no effort"),
        ({"sequence_length": 10}, "`data.sequence_length` must be at least"),
        ({"validation": ["."]}, f"has no {INFO}"),
    ],
)
def test_what_does_not_fit_is_refused(folder, fields, told):
    with pytest.raises(UserError, match=told):
        open_episode_data(section(folder, **fields), MODEL)


def test_other_versions_and_no_files_are_refused(folder):
    info = json.loads((folder / "data" / INFO).read_text())
    (folder / "data" / INFO).write_text(json.dumps(info | {"codebase_version": "v1.6"}))
    with pytest.raises(UserError, match=r"codebase_version v2.0 to v3.0, but is of 'v1.6'"):
        Folder(folder / "data", "observation.state", "action")
    (folder / "data" / INFO).write_text(json.dumps(info))
    for file in folder.glob("data/data/**/*.parquet"):
        file.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="must be a parquet file, but cannot be read"):
        open_episode_data(section(folder), MODEL)


# ---------------------------------------------------------------- samples


def test_episodes_are_held_out_whole_and_scaled_by_those_that_are_trained_on(folder, shown):
    train, held_out = open_episode_data(section(folder, validation=0.4), MODEL)
    assert held_out is not None and len(train) + len(held_out) == sum(len(one.states) for one in shown)
    batch = train.read(np.arange(len(train)))
    assert torch.allclose(batch.state.mean(0), torch.zeros(6), atol=1e-4)
    assert torch.allclose(batch.state.std(0, correction=0), torch.ones(6), atol=1e-4)
    assert held_out.facts == train.facts and held_out.fingerprint != train.fingerprint
    first = batch.actions[:, 0]
    undone = train.scales["action"].undo(first.numpy())
    assert np.abs(undone).max() <= arm.LONGEST_MOVE + 1e-6

    ranged, _ = open_episode_data(section(folder, normalization="min_max"), MODEL)
    states = ranged.read(np.arange(len(ranged))).state
    assert torch.allclose(states.amin(0), -torch.ones(6), atol=1e-5) and torch.allclose(
        states.amax(0), torch.ones(6), atol=1e-5
    )


def test_a_number_that_never_changes_is_left_as_it_is(folder):
    for episode in range(6):
        change(folder, "observation.state", [0.5] * 6, episode, None)
    dataset, _ = open_episode_data(section(folder), MODEL)
    assert torch.equal(dataset.read(np.arange(4)).state, torch.zeros(4, 6))


def test_data_and_models_of_others_do_not_mix():
    text = load_spec("gpt-stdlib")
    with pytest.raises(UserError, match=r'`data.kind` must be one of text for a model of kind "decoder"'):
        change_spec(text, data=SPEC.data, validation=None)
    with pytest.raises(UserError, match=r'`data.kind` must be "episodes" or "synthetic"'):
        change_spec(SPEC, data=text.data)


# ---------------------------------------------------------------- acting


class Expert(nn.Module):
    """A policy that looks where the disc is, and moves as its demonstrator."""

    def __init__(self, scales) -> None:
        super().__init__()
        self.scales = scales

    def forward(self, images, instruction, state):
        x, y = self.scales["state"].undo(state.numpy())[:, :2].T
        found = np.zeros((len(state), 8, 2), np.float32)
        for number, (view, ids) in enumerate(zip(images[:, 0].numpy(), instruction, strict=True)):
            colour = arm.COLOURS[bytes(ids.to(torch.uint8).tolist()).split()[2].decode()]
            near = np.abs(view.astype(int) - colour).sum(axis=2) < 40
            rows, columns = np.nonzero(near)
            goal = (
                np.array([(columns.mean() + 0.5) / 16 - 1, 1 - (rows.mean() + 0.5) / 16]) if len(rows) else np.zeros(2)
            )
            way = goal - (x[number], y[number])
            found[number, 0] = way * min(1, arm.LONGEST_MOVE / max(1e-9, np.linalg.norm(way)))
        return torch.from_numpy(self.scales["action"].apply(found).astype(np.float32))


def test_who_sees_what_the_cameras_see_can_do_it(folder):
    dataset, _ = open_episode_data(section(folder), MODEL)
    found = roll_out(Policy(Expert(dataset.scales), SPEC, dataset.scales), trials=40, seed=3, execute=1)
    assert found.succeeded >= 36 and all(step is None or step > 2 for step in found.steps)
    nothing = torch.from_numpy(dataset.scales["action"].apply(np.zeros((40, 8, 2), np.float32)))
    still = Policy(lambda *_: nothing, SPEC, dataset.scales)
    assert roll_out(still, trials=40, seed=3, execute=4).succeeded == 0
    with pytest.raises(UserError, match="`--execute` must be at most"):
        roll_out(still, trials=2, seed=3, execute=9)


def test_wilsons_interval():
    low, high = wilson(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-3) and high == pytest.approx(0.9433, abs=1e-3)
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-9) and wilson(10, 10)[1] == pytest.approx(1)


def test_a_checkpoint_acts(tmp_path):
    sets = (
        *("max_steps=2", "schedule.warmup_steps=1", "validation=null", "data.simulated_episodes=8"),
        *("backend.kind=single", f"data.cache={tmp_path}/cache", "tracking.tensorboard=false"),
    )
    flags = [word for setting in sets for word in ("--set", setting)]
    run = tmp_path / "run"
    done = python("launch/train.py", "--spec", "atlas-vla-tiny", "--run-dir", str(run), *flags)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    out, gif = tmp_path / "rollout.json", tmp_path / "trials.gif"
    found = []
    for more in ((), ("--untrained",)):
        words = ("-m", "scaling.rollout", str(run), "--trials", "12", "--json", str(out), "--gif", str(gif), *more)
        done = python(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(json.loads(out.read_text()))
        assert f"{found[-1]['succeeded']} of 12 trials succeed" in done.stdout
    assert found[0]["success"] == found[0]["succeeded"] / 12 and found[1]["untrained"]
    assert gif.read_bytes().startswith(b"GIF8")
    done = python("-m", "scaling.rollout", str(tmp_path))
    assert done.returncode == 5 and "must be a run folder or a checkpoint" in done.stderr
