"""JobSets: what is filled in, and what the schemas of JobSet and Job ask for."""

from __future__ import annotations

import pytest

from tests.launch.common import LAUNCH, needs_bash

yaml = pytest.importorskip("yaml")
pytestmark = needs_bash
FLAGS = ["--config=configs/pretrain.py:85m", "--corpus=gs://b/c", '--card=a "quoted" \\ & ${NAME}']
TPU = ["--name=run-1", "--image=r/i:1", "--accelerator=tpu-v5-lite-podslice", "--topology=4x4"]
GPU = ["--name=run-1", "--image=r/i:1", "--accelerator=nvidia-h100-80gb", "--hosts=2"]


def documents(scene, *options):
    result = scene.run("gke/jobset.sh", "render", *options, "--", *FLAGS)
    assert result.returncode == 0, result.stderr
    return list(yaml.safe_load_all(result.stdout))


@pytest.mark.parametrize(
    ("options", "resource", "hosts", "chips"),
    [
        (TPU, "google.com/tpu", 4, "4"),
        ([*TPU[:2], "--accelerator=tpu-v5p-slice", "--topology=4x4x4"], "google.com/tpu", 16, "4"),
        ([*TPU[:3], "--topology=2x4", "--chips-per-host=8"], "google.com/tpu", 1, "8"),
        (GPU, "nvidia.com/gpu", 2, "8"),
    ],
)
def test_jobset(scene, options, resource, hosts, chips):
    *others, jobset = documents(scene, *options)
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert jobset["kind"] == "JobSet"
    assert jobset["metadata"]["name"] == "run-1"
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert set(rule) == {"name", "action", "onJobFailureReasons"}
    assert rule["action"] == "FailJobSet"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 200
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    # jax numbers the processes by completion index, and asks for parallelism.
    assert job["parallelism"] == job["completions"] == hosts
    assert job["completionMode"] == "Indexed"
    assert job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    # A pod failure policy needs pods that are never restarted in place.
    assert pod["restartPolicy"] == "Never"
    (failure,) = job["podFailurePolicy"]["rules"]
    (container,) = pod["containers"]
    assert failure["action"] == "FailJob"
    assert failure["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [2],
    }
    assert container["image"] == "r/i:1"
    assert container["args"] == FLAGS
    assert container["resources"]["limits"] == {resource: chips}
    assert container["resources"]["requests"] == {resource: chips}
    assert pod["serviceAccountName"] == "cellplm"
    if resource == "google.com/tpu":
        assert not others
        assert "cloud.google.com/gke-tpu-topology" in pod["nodeSelector"]
    else:
        # Finding the other pods through Kubernetes needs permission.
        account, role, binding = others
        assert [d["kind"] for d in others] == ["ServiceAccount", "Role", "RoleBinding"]
        assert account["metadata"]["name"] == binding["subjects"][0]["name"] == "cellplm"
        assert binding["roleRef"]["name"] == role["metadata"]["name"]
        allowed = {resource for rule in role["rules"] for resource in rule["resources"]}
        assert allowed == {"pods", "services", "jobs"}
    assert "cloud.google.com/gke-spot" not in pod["nodeSelector"]
    spot = documents(scene, *options, "--spot")[-1]["spec"]["replicatedJobs"][0]["template"]
    assert spot["spec"]["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-spot"] == "true"


@pytest.mark.parametrize("name", ["jobset.yaml", "jobset-gpu.yaml"])
def test_templates_are_yaml_before_they_are_filled_in(name):
    assert all(yaml.safe_load_all((LAUNCH / "gke" / name).read_text()))


def test_apply_watch_logs_delete(scene):
    assert scene.run("gke/jobset.sh", "apply", *TPU, "--", *FLAGS).returncode == 0
    applied = yaml.safe_load((scene.folder / "applied.yaml").read_text())
    assert applied == documents(scene, *TPU)[0]
    scene.answers("conditions", "", "StartupPolicyCompleted", "Completed")
    result = scene.run("gke/jobset.sh", "watch", "--name=run-1")
    assert result.returncode == 0
    assert len(scene.calls("kubectl")) == 4
    scene.answers("conditions", "Failed")
    assert scene.run("gke/jobset.sh", "watch", "--name=run-1").returncode == 1
    scene.run("gke/jobset.sh", "logs", "--name=run-1")
    scene.run("gke/jobset.sh", "delete", "--name=run-1")
    logs, delete = scene.calls("kubectl")[-2:]
    assert (
        "--selector=jobset.sigs.k8s.io/jobset-name=run-1,batch.kubernetes.io/job-completion-index=0"
        in logs
    )
    assert delete == ["delete", "jobset/run-1"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--name=Run_1"], "lower-case"),
        ([*TPU[:3]], "no topology"),
        ([*TPU[:3], "--topology=4by4"], "expected numbers"),
        ([*TPU[:3], "--topology=3x3"], "9 chips"),
        ([*TPU, "--hosts=3"], "are not the 16 chips"),
        (GPU[:3], "no number of nodes"),
        ([TPU[0], *TPU[2:]], "no image"),
        ([*TPU, "--spots"], "unknown option"),
    ],
)
def test_bad_usage(scene, options, said):
    result = scene.run("gke/jobset.sh", "apply", *options, "--", *FLAGS)
    assert result.returncode == 2
    assert said in result.stderr
    assert scene.calls("kubectl") == []


def test_dockerfile_copies_what_the_program_needs():
    text = (LAUNCH / "gke" / "Dockerfile").read_text()
    for needed in ("cellplm_jax", "configs", "launch", "setup.py"):
        assert f"COPY {needed}" in text or f" {needed} " in text
    assert 'ENTRYPOINT ["python", "launch/pretrain.py"]' in text
    assert "jax[k8s]" in text
