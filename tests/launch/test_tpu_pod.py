"""The life of a TPU slice, played through with a gcloud that records and answers from a script."""

from __future__ import annotations

import pytest

from tests.launch.common import needs_bash

pytestmark = needs_bash
FLAGS = ["--config=configs/pretrain.py:85m", "--corpus=gs://b/corpus", "--workdir=gs://b/runs/1"]
POD = ["--project=p", "--zone=us-west4-a", "--name=run-1"]
SLICE = [*POD, "--accelerator=v5litepod-16"]


@pytest.fixture
def pod(scene, tmp_path):
    """``pod(command, *options)`` runs the script with its state in the test's folder."""

    def run(command, *options, flags=FLAGS, **environment):
        arguments = [command, *SLICE, f"--state={tmp_path / 'state'}", *options]
        if flags:
            arguments += ["--", *flags]
        return scene.run("tpu_pod.sh", *arguments, **environment)

    return run


def story(scene) -> list[str]:
    """What gcloud was asked to do, in short; looking is left out."""
    short = []
    for call in scene.calls("gcloud"):
        line = " ".join(call)
        if "queued-resources" in line:
            verb = call[call.index("queued-resources") + 1]
            if verb != "describe":
                short.append(verb)
        elif "tpu-vm scp" in line:
            short.append("scp")
        elif "status; else" in line:
            continue
        else:
            for verb in ("setup", "start", "stop", "kill"):
                if f"tpu_worker.sh {verb}" in line:
                    short.append(verb)
            if "cat cellplm-run/log" in line:
                short.append("logs")
    return short


def test_a_slice_is_made_used_and_deleted(scene, pod, tmp_path):
    scene.answers(
        "states", "NOT_FOUND", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"
    )
    scene.answers(
        "workers", "absent;absent", "idle;idle", "running;running", "finished 0;finished 0"
    )
    result = pod("up", "--spot", "--service-account=me@p")
    assert result.returncode == 0, result.stdout + result.stderr
    assert story(scene) == ["create", "scp", "setup", "start", "logs", "delete"]
    create = next(call for call in scene.calls("gcloud") if "create" in call)
    assert "--accelerator-type=v5litepod-16" in create
    assert "--runtime-version=v2-alpha-tpuv5-lite" in create
    assert "--node-id=run-1" in create
    assert {"--zone=us-west4-a", "--project=p", "--spot", "--service-account=me@p"} <= set(create)
    start = next(call for call in scene.calls("gcloud") if any("sh start" in a for a in call))
    assert "--worker=all" in start
    assert any("--corpus=gs://b/corpus" in argument for argument in start)
    delete = next(call for call in scene.calls("gcloud") if "delete" in call)
    assert {"--force", "--quiet"} <= set(delete)
    assert (tmp_path / "state" / "source.tar.gz").stat().st_size > 10_000
    for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"):
        assert f"the slice is {state}" in result.stdout


@pytest.mark.parametrize("end", ["SUSPENDED", "FAILED"])
def test_a_preempted_slice_is_made_again_and_resumes(scene, pod, end):
    scene.answers("states", "ACTIVE", "ACTIVE", "SUSPENDING", end, "PROVISIONING", "ACTIVE")
    scene.answers(
        "workers", "running;running", "running;running", "absent;absent", "idle;idle", "running;running",
        "finished 0;finished 0",
    )  # fmt: skip
    result = pod("up")
    assert result.returncode == 0, result.stdout + result.stderr
    assert story(scene) == ["delete", "create", "scp", "setup", "start", "logs", "delete"]
    assert f"the slice is {end}" in result.stdout


def test_code_is_sent_as_it_was_at_first(scene, pod, tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "source.tar.gz").write_bytes(b"the code of the first set-up")
    scene.answers("workers", "absent", "idle", "finished 0")
    assert pod("up").returncode == 0
    assert (tmp_path / "state" / "source.tar.gz").read_bytes() == b"the code of the first set-up"


def test_workers_out_of_reach_five_times_are_replaced(scene, pod):
    scene.answers("workers", *["UNREACHABLE"] * 5, "absent", "idle", "finished 0")
    result = pod("up")
    assert result.returncode == 0, result.stdout
    assert story(scene) == ["delete", "create", "scp", "setup", "start", "logs", "delete"]


def test_workers_out_of_reach_for_a_moment_are_not(scene, pod):
    scene.answers("workers", *["UNREACHABLE"] * 4, "running", *["UNREACHABLE"] * 4, "finished 0")
    assert pod("up").returncode == 0
    assert story(scene) == ["logs", "delete"]


def test_nothing_is_deleted_because_gcloud_does_not_answer(scene, pod):
    scene.answers("states", "TIMEOUT")
    result = pod("up")
    assert result.returncode == 1
    assert story(scene) == []
    assert "run this command again" in result.stdout


def test_a_crash_is_started_again_on_the_same_slice(scene, pod):
    scene.answers(
        "workers",
        "running;running",
        "finished 134;finished 1",
        "running;running",
        "finished 0;finished 0",
    )
    result = pod("up")
    assert result.returncode == 0, result.stdout
    assert story(scene) == ["logs", "start", "logs", "delete"]
    assert "ended with status 1;" in result.stdout


def test_workers_that_hang_after_others_ended_are_killed_and_all_start_again(scene, pod):
    scene.answers(
        "workers", "running;finished 1", "finished 137;finished 1", "running;running", "finished 0;finished 0"
    )  # fmt: skip
    result = pod("up", MIXED="0")
    assert result.returncode == 0, result.stdout
    assert story(scene) == ["kill", "logs", "start", "logs", "delete"]


def test_a_worker_that_did_not_start_with_the_others_is_started(scene, pod):
    scene.answers("workers", "running;idle", "running;running", "finished 0;finished 0")
    assert pod("up").returncode == 0
    assert story(scene) == ["start", "logs", "delete"]


def test_refused_input_ends_it_with_2_and_deletes(scene, pod):
    scene.answers("workers", "running;running", "finished 134;finished 2")
    result = pod("up")
    assert result.returncode == 2
    assert story(scene) == ["logs", "delete"]


def test_it_gives_up_after_so_many_failures_in_a_row_and_deletes(scene, pod):
    scene.answers("states", "FAILED")
    result = pod("up", "--attempts=3")
    assert result.returncode == 1
    assert story(scene) == [*["delete", "create"] * 3, "delete"]
    assert "gave up after 3 failures" in result.stdout


def test_backing_off_doubles_up_to_a_quarter_of_an_hour(scene, pod, tmp_path):
    """``sleep`` is replaced by one that records."""
    folder = tmp_path / "sleep"
    folder.mkdir()
    (folder / "sleep").write_text('#!/usr/bin/env bash\necho "$1" >> "$STAND_IN/sleeps"\n')
    (folder / "sleep").chmod(0o755)
    scene.answers("states", "FAILED")
    path = f"{folder}:{scene.environment['PATH']}"
    assert pod("up", "--attempts=8", PATH=path, BACKOFF="30").returncode == 1
    sleeps = (scene.folder / "sleeps").read_text().split()
    assert sleeps == ["30", "60", "120", "240", "480", "900", "900", "900"]


def test_a_first_request_that_is_refused_is_not_repeated(scene, pod):
    scene.answers("states", "NOT_FOUND")
    scene.answers("create", "1")
    result = pod("up")
    assert result.returncode == 1
    assert story(scene) == ["create"]


def test_kept_slices_are_pointed_out(scene, pod):
    scene.answers("workers", "finished 0")
    result = pod("up", "--keep")
    assert result.returncode == 0
    assert "delete" not in story(scene)
    assert "costs money" in result.stdout


def test_stop_and_delete_reach_a_watch_elsewhere(scene, pod, tmp_path):
    scene.answers("workers", "finished 143")
    assert pod("stop", flags=None).returncode == 0
    assert story(scene) == ["stop"]
    assert (tmp_path / "state" / "stopped").exists()
    assert pod("delete", flags=None).returncode == 0
    assert (tmp_path / "state" / "deleted").exists()
    # A new 'up' is a new wish.
    scene.answers("workers", "finished 143", "running", "finished 0")
    assert pod("up").returncode == 0
    assert not (tmp_path / "state" / "stopped").exists()
    assert not (tmp_path / "state" / "deleted").exists()


def test_a_stopped_run_is_not_started_again(scene, pod, tmp_path):
    """The stop comes while 'watch' looks: the stand-in for ssh makes the mark."""
    scene.answers("states", "ACTIVE")
    scene.answers("workers", "running", "finished 143")
    folder = tmp_path / "gcloud"
    folder.mkdir()
    (folder / "gcloud").write_text(
        f'#!/usr/bin/env bash\ntouch "{tmp_path}/state/stopped"\n'
        f'exec bash "{scene.environment["PATH"].split(":")[0]}/gcloud" "$@"\n'
    )
    (folder / "gcloud").chmod(0o755)
    result = pod("watch", PATH=f"{folder}:{scene.environment['PATH']}")
    assert result.returncode == 143
    assert story(scene) == ["logs"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["up", *POD, "--", *FLAGS], "no accelerator"),
        (["up", "--zone=z", "--name=n", "--accelerator=v5p-8", "--", *FLAGS], "no project"),
        (["up", *POD, "--accelerator=v9-8", "--", *FLAGS], "no runtime version is known"),
        (["up", *SLICE], "no flags for pretrain.py"),
        (["up", *SLICE, "--", *FLAGS[:2]], "--workdir="),
        (["up", *SLICE, "--program=embed", "--", *FLAGS], "embed.py needs --out="),
        (["up", *SLICE, "--program=absent", "--", *FLAGS], "unknown program 'absent'"),
        (["up", *SLICE, "--", *FLAGS[:2], "--workdir=runs/1"], "give a gs:// address"),
        (["up", *SLICE, "--config=x", "--", *FLAGS], "unknown option '--config=x'"),
        (["uq", *SLICE], "unknown command 'uq'"),
        (["up", *SLICE, "--attempts=x", "--", *FLAGS], "expected a number"),
    ],
)
def test_bad_usage_is_refused_before_anything_is_run(scene, arguments, said):
    result = scene.run("tpu_pod.sh", *arguments)
    assert result.returncode == 2
    assert said in result.stderr
    assert scene.calls("gcloud") == []


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [
        ("v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v5p-512", "v2-alpha-tpuv5"),
        ("v6e-256", "v2-alpha-tpuv6e"),
        ("v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_runtime_versions(scene, accelerator, runtime):
    result = scene.run("tpu_pod.sh", "create", *POD, f"--accelerator={accelerator}", "--dry-run")
    assert f"--runtime-version={runtime} " in result.stdout
