"""What a run shows to others: no secret in its folder, no folder but its own, no open port beyond this machine."""

import json
import os
import socket
import stat
import subprocess
import sys

import pytest
from processes import ENVIRONMENT, ROOT, SPECS

from benchmarks.faults.mutations import maximal_specs
from scaling.errors import UserError
from scaling.redact import redacted, redacted_json
from scaling.run_folder import open_run_folder
from scaling.spec import load_spec

TRAIN, SPEC = str(ROOT / "launch" / "train.py"), str(SPECS / "llama-parity.json")
SHORT = ("--set", "max_steps=2", "--set", "schedule.warmup_steps=1", "--set", "profile.interval=1")
OWN = ("--allow-import", "own_objectives")
SECRETS = {
    "HF_TOKEN": "hf_CANARY0000000000",
    "WANDB_API_KEY": "CANARY1111111111",
    "AWS_SECRET_ACCESS_KEY": 'CANARY2/22"22\\22é',
    "HTTPS_PROXY": "http://me:CANARY3333@proxy.example.org:3128",
    "MY_DATA_URL": "s3://CANARY4444:@bucket/x",
    "MY_HEADERS": "Authorization: Bearer CANARY5555",
}


def start(*command, **environment):
    return subprocess.run(
        command,
        cwd=ROOT / "tests",
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def factory(name, **arguments):
    return "objective=" + json.dumps({"kind": "factory", "target": f"own_objectives:{name}", "arguments": arguments})


def canaries_in(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path.name for path in files if b"CANARY" in path.read_bytes() or "CANARY" in path.name]


@pytest.mark.fault("S7")
def test_no_secret_is_in_the_folder_of_a_run(tmp_path):
    folder = tmp_path / "run"
    more = ("--set", 'validation={"interval": 2, "batches": 1}', "--set", "tracking.tensorboard=true")
    done = start(sys.executable, TRAIN, "--spec", SPEC, "--run-dir", str(folder), *SHORT, *more, **SECRETS)
    assert done.returncode == 0, done.stderr
    assert canaries_in(folder) == []


@pytest.mark.fault("S7")
def test_no_secret_is_in_the_folder_of_a_run_that_crashed_on_one(tmp_path):
    folder = tmp_path / "run"
    # One is in the spec, too: outside of a URL nobody can know it there but by its value.
    more = (*OWN, "--set", factory("crashing", after=2, secrets=list(SECRETS), token=SECRETS["HF_TOKEN"]))
    done = start(sys.executable, TRAIN, "--spec", SPEC, "--run-dir", str(folder), *SHORT, *more, **SECRETS)
    assert done.returncode == 1
    assert "CANARY" in done.stderr, "the interpreter's own traceback shows that the error did hold the secrets"
    assert canaries_in(folder) == []
    log = (folder / "train.log").read_text()
    assert "Traceback" in log and log.count("***") >= len(SECRETS)
    assert "***" in json.loads((folder / "exit.json").read_text())["reason"]
    assert json.loads((folder / "spec.json").read_text())["objective"]["arguments"]["token"] == "***"


@pytest.mark.fault("S7")
def test_no_secret_is_told_to_whoever_asks_for_metrics(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    page = tmp_path / "page"
    more = (*OWN, "--set", factory("reading", address=f"http://127.0.0.1:{port}/metrics", out=str(page)))
    groups = [{"name": SECRETS["HF_TOKEN"], "match": ["*"]}]  # whoever does this
    tracking = ("--set", f'tracking.prometheus={{"port": {port}}}', "--set", f"param_groups={json.dumps(groups)}")
    folder = str(tmp_path / "run")
    done = start(sys.executable, TRAIN, "--spec", SPEC, "--run-dir", folder, *SHORT, *more, *tracking, **SECRETS)
    assert done.returncode == 0, done.stderr
    told = page.read_text()
    assert 'scaling_step{run="llama-parity"} 1' in told and 'group="***"' in told
    assert "CANARY" not in told and str(tmp_path) not in told and socket.gethostname() not in told


def test_redacting_takes_the_secrets_and_leaves_the_rest(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token-file")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "tokenizers-parallel")
    monkeypatch.setenv("SHORT_TOKEN", "true")
    plain = "true: loss 2.5 at s3://bucket/a@b, me@example.org, /var/run/token-file, tokenizers-parallel"
    assert redacted(plain) == plain
    for value in SECRETS.values():
        assert "CANARY" not in redacted(f"a {value} b")
    hidden = redacted_json({SECRETS["HF_TOKEN"]: [SECRETS["AWS_SECRET_ACCESS_KEY"], 1, None], "x": {"y": "plain"}})
    assert hidden == {"***": ["***", 1, None], "x": {"y": "plain"}}


def texts(value, path=()):
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, str):
            yield (*path, key)
        elif isinstance(inner, dict | list):
            yield from texts(inner, (*path, key))


@pytest.mark.fault("S7")
def test_a_spec_holds_no_password_in_a_url(tmp_path):
    address = "https://me:CANARY@example.org/x?y=z"
    file = tmp_path / "spec.json"
    for spec in maximal_specs():
        file.write_text(json.dumps(spec))
        for path in texts(spec):
            name = ".".join(map(str, path))
            with pytest.raises(UserError) as caught:
                load_spec(str(file), [f"{name}={address}"])
            assert f"`{name}` must have no user name or password" in str(caught.value)
            assert "CANARY" not in str(caught.value)
    # Nor does a line about what contradicts repeat it: here the path stands with nothing to hold.
    backend = json.dumps({"kind": "deepspeed", "zero_stage": 3, "nvme_path": address})
    with pytest.raises(UserError) as caught:
        load_spec("gpt-stdlib", [f"backend={backend}"])
    assert "nvme_path" in str(caught.value) and "CANARY" not in str(caught.value)
    assert load_spec(str(file), ["$schema=https://example.org/a@b"]).schema_ == "https://example.org/a@b"


NAMES = [
    "../../x",
    "/tmp/x",
    "a/b",
    "..",
    ".",
    "",
    "a\0b",
    "x" * 300,
    "ünï",
    "ru\u202en",
    "a b",
    "a\n",
    "~",
    "-rf",
    "\udcff",
]


@pytest.mark.fault("S8")
@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_run_is_the_name_of_a_folder_in_runs(name, tmp_path):
    file = tmp_path / "spec.json"
    spec = json.loads((SPECS / "llama-parity.json").read_text())
    file.write_text(json.dumps({**spec, "name": name}))
    with pytest.raises(UserError) as caught:
        load_spec(str(file))
    assert "`name`" in str(caught.value) and len(str(caught.value).splitlines()) == 1
    with pytest.raises(UserError):
        load_spec(SPEC, [f"name={name}"])


@pytest.mark.fault("S8")
def test_a_run_folder_that_cannot_be_is_refused_in_one_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("absent/folder")
    os.mkfifo(tmp_path / "pipe")
    folders = [
        "a\0b",
        "x" * 300,
        "x/" * 3000,
        "/dev/null",
        "/dev/null/x",
        "/proc/x",
        *(map(str, tmp_path.iterdir())),
        "",
    ]
    program = (
        "import json, sys\nfrom scaling.errors import run_command\nfrom scaling.train import main\n"
        "for folder in json.loads(sys.argv[1]):\n"
        f"    code = run_command(lambda: main(['--spec', {SPEC!r}, '--run-dir', folder]))\n"
        "    print(code, file=sys.stderr)\n"
    )
    done = start(sys.executable, "-c", program, json.dumps(folders), PYTHONPATH=str(ROOT))
    said = done.stderr.splitlines()
    assert len(said) == 2 * len(folders), done.stderr
    assert said[1::2] == ["6"] * (len(folders) - 1) + ["2"]
    assert all("--run-dir" in line and " must be " in line and len(line) <= 300 for line in said[::2])


@pytest.mark.fault("S9")
def test_a_new_run_folder_is_its_owners_alone(tmp_path):
    before = os.umask(0o022)
    try:
        open_run_folder(tmp_path / "runs" / "new", resume="auto", saves=True).close()
        (tmp_path / "shared").mkdir(mode=0o755)
        open_run_folder(tmp_path / "shared", resume="auto", saves=True).close()
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("runs", "runs/new", "shared")]
    assert modes == [0o755, 0o700, 0o755]


def addresses(folder):
    return [address for path in folder.glob("sockets.*") for address in json.loads(path.read_text())]


def is_local(address):
    """Of an address in hex, as in /proc/net/tcp (each word of it in the order of this machine's bytes)."""
    mapped = "0" * 16 + "FFFF0000"  # an IPv4 address in IPv6
    if len(address) == 8 or address.startswith(mapped):
        return address.endswith("7F")
    return address == "0" * 24 + "01000000"


@pytest.mark.fault("S9")
@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="looks at Linux's list of sockets")
@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_a_run_on_one_machine_listens_to_nobody_else(launcher, tmp_path):
    # torchrun's own process is another matter: its rendezvous and its store listen on every interface, whatever the
    # endpoint, unauthenticated. What it starts must not add to that.
    head = [sys.executable]
    if launcher == "torchrun":
        head = ["torchrun", "--nproc_per_node=2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    backend = "single" if launcher == "python" else "ddp"
    more = (
        *OWN,
        "--set",
        factory("looking_at_sockets", out=str(tmp_path / "sockets")),
        "--set",
        'tracking.prometheus={"port": 0}',
        "--set",
        f"backend.kind={backend}",
    )
    done = start(*head, TRAIN, "--spec", SPEC, "--run-dir", str(tmp_path / "run"), *SHORT, *more)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("sockets.*"))) == (2 if launcher == "torchrun" else 1)
    ranks = addresses(tmp_path)
    assert all(map(is_local, ranks)), ranks


@pytest.mark.fault("S9 control")
@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="looks at Linux's list of sockets")
def test_listening_is_seen(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    from own_objectives import listening

    with socket.create_server(("127.0.0.1", 0)), socket.create_server(("0.0.0.0", 0)):
        seen = listening()
    assert sorted(map(is_local, seen))[0] is False and any(map(is_local, seen))
