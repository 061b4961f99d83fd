"""Build both container images and run the CPU one: `make image-test`.

    python deploy/test/images.py [--keep] [--record]

vLLM publishes the images that ours are built on; where they cannot be had, stand-ins do, under the
names that the Dockerfiles say: Debian roots in which Python finds the CPU build of vLLM that `make
venv` installed, mounted and not copied, because it has gigabytes.  One is laid out as vLLM's CPU
image, with a virtual environment in `/opt/venv`, the other as its GPU image, without.  So both
Dockerfiles run to their ends, unchanged, and the CPU image is then used as an operator would: it
serves as its own user, answers about an mp4, is scraped by a real Prometheus with this project's
rules, makes alerts fire, and is ended by SIGTERM.  What it never shows: a GPU, and vLLM's own
images.

It needs root (the images hold files of several users), Debian, buildah, debootstrap and prometheus,
4 GB of disk for a while, and ten minutes on two cores.  buildah's `chroot` isolation shares
the machine's network and process numbers, and needs no daemon.  Everything is written into
`.image-test/`, which is removed at the end; `--keep` keeps the stand-ins for the next run.
`--record` writes the result into docs/deployment.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import images_run  # noqa: E402
import pages  # noqa: E402
from images_run import Failed, say  # noqa: E402

WORK = ROOT / ".image-test"
DOCS = ROOT / "docs" / "deployment.md"
DOCKERFILES = {"cpu": "deploy/docker/Dockerfile.cpu", "gpu": "Dockerfile"}
PACKAGES = ("ca-certificates", "g++", "libnuma1", "python3", "python3-dev", "python3-venv")
UV = "uv==0.13.9"
DEBIAN = "localhost/debian:stand-in"
USER = "2000:0"
VENV = "/opt/venv"
STAND_IN = "/stand-in"  # where this environment's packages are mounted, in every container
# The command as pip writes it: processes that vLLM spawns read it again, and must not serve, too.
VLLM = f"""\
#!{VENV}/bin/python3
import sys
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    sys.exit(main())
"""
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Buildah:
    """buildah with a storage of its own, so that nothing else on the machine is touched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mount = f"--volume={sysconfig.get_paths()['purelib']}:{STAND_IN}:ro"
        self.command = ["buildah", "--root", str(folder / "storage"), "--runroot"]
        self.command += [str(folder / "run"), "--storage-driver", storage_driver(folder)]
        # `FROM vllm/...` is docker.io's, as docker takes it; nothing is ever pulled.
        names = folder / "registries.conf"
        names.write_text('unqualified-search-registries = ["docker.io"]\n')
        isolated = {"BUILDAH_ISOLATION": "chroot", "CONTAINERS_REGISTRIES_CONF": str(names)}
        self.env = os.environ | isolated

    def __call__(self, *arguments: str | Path) -> str:
        """Run a subcommand to its end; returns what it prints.

        Raises:
            Failed: it failed; with what it said.
        """
        name, *rest = map(str, arguments)
        seen = [self.mount] if name in ("run", "bud") else []
        command = [*self.command, name, *seen, *rest]
        done = subprocess.run(
            command, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode:
            said = f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
            raise Failed(f"buildah {' '.join(map(str, arguments))}\n{said}")
        return done.stdout.strip()

    def exists(self, image: str) -> bool:
        return image in self("images", "--format", "{{.Name}}:{{.Tag}}").split()

    def remove(self) -> None:
        """Remove the storage, and with it every container and image.

        Raises:
            Failed: something in it is still mounted, and would be deleted through the mount.
        """
        for command in (("rm", "--all"), ("rmi", "--all", "--force")):
            self(*command)
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        mounted = [line.split()[4] for line in lines if f"{self.folder}/" in line.split()[4]]
        if mounted:
            raise Failed(
                f"still mounted: {', '.join(mounted)}; unmount it and remove {self.folder}"
            )
        shutil.rmtree(self.folder)


def storage_driver(folder: Path) -> str:
    """overlay where it can be mounted here, else vfs, which copies whole images."""
    if "STORAGE_DRIVER" in os.environ:
        return os.environ["STORAGE_DRIVER"]
    with tempfile.TemporaryDirectory(dir=folder) as name:
        parts = {part: Path(name) / part for part in ("lower", "upper", "work", "all")}
        for path in parts.values():
            path.mkdir()
        options = f"lowerdir={parts['lower']},upperdir={parts['upper']},workdir={parts['work']}"
        mount = ["mount", "-t", "overlay", "overlay", "-o", options, str(parts["all"])]
        if subprocess.run(mount, capture_output=True).returncode:
            return "vfs"
        subprocess.run(["umount", str(parts["all"])], check=True)
    return "overlay"


def base_names() -> dict[str, str]:
    """The images that the Dockerfiles are built on, by ours, as docker reads their names."""
    return {
        kind: "docker.io/" + re.search(r"(?m)^FROM (\S+)", (ROOT / path).read_text())[1]
        for kind, path in DOCKERFILES.items()
    }


def check_machine() -> None:
    """Say what is missing before minutes of work, not after them.

    Raises:
        Failed: something is.
    """
    if not Path("/etc/debian_version").exists():
        raise Failed("image-test needs a Debian machine: its stand-ins are made by debootstrap")
    if os.geteuid():
        raise Failed("image-test needs root: the images hold files of several users")
    missing = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    if images_run.prometheus() is None:
        missing.append("prometheus")
    if missing:
        raise Failed(
            f"image-test needs {', '.join(missing)}: apt-get install --no-install-recommends "
            f"{' '.join(missing)}"
        )
    if "cpu" not in images_run.version("vllm"):
        raise Failed("image-test needs vLLM's CPU build here: make venv")
    if shutil.disk_usage(ROOT).free < 4e9:
        raise Failed("image-test needs 4 GB of free disk")


# -- the stand-ins -------------------------------------------------------------------------------


def make_debian(buildah: Buildah, name: str) -> None:
    """A Debian root with what vLLM's CPU build needs of the system."""
    container = buildah("from", "scratch")
    root = buildah("mount", container)
    mirror = [os.environ["DEBIAN_MIRROR"]] if "DEBIAN_MIRROR" in os.environ else []
    suite = platform.freedesktop_os_release()["VERSION_CODENAME"]
    debootstrap = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}"]
    images_run.call([*debootstrap, suite, root, *mirror])
    shutil.rmtree(Path(root) / "var" / "cache" / "apt")
    buildah("config", "--env", f"PATH={SYSTEM_PATH}", container)
    buildah("umount", container)
    buildah("commit", "--rm", "--format", "docker", container, name)


def make_cpu_base(buildah: Buildah, debian: str, name: str) -> None:
    """That, with a virtual environment that finds vLLM, and uv where only root finds it."""
    container = buildah("from", "--pull-never", debian)
    root = Path(buildah("mount", container))
    buildah("run", container, "--", "python3", "-m", "venv", "--without-pip", VENV)
    (site,) = (root / VENV[1:] / "lib").glob("python3.*/site-packages")
    ours = Path(sysconfig.get_paths()["purelib"])
    if site.parent.name != ours.parent.name:
        raise Failed(
            f"Debian has {site.parent.name}, and .venv {ours.parent.name}: make venv with Debian's "
            "own Python (make clean; make venv PYTHON=/usr/bin/python3)"
        )
    see_vllm(site)
    vllm = root / VENV[1:] / "bin" / "vllm"
    vllm.write_text(VLLM)
    vllm.chmod(0o755)
    install_uv(root / "root" / ".local" / "bin")
    # Whoever vouches for the package index on this machine does so in the image, too.
    bundle = os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt")
    shutil.copyfile(bundle, root / "etc" / "ssl" / "certs" / "ca-certificates.crt")
    env = {
        "PATH": f"{VENV}/bin:/root/.local/bin:{SYSTEM_PATH}",
        "VIRTUAL_ENV": VENV,
        "SSL_CERT_FILE": "/etc/ssl/certs/ca-certificates.crt",
    }
    pairs = [part for key, value in env.items() for part in ("--env", f"{key}={value}")]
    buildah("config", *pairs, "--entrypoint", '["vllm", "serve"]', container)
    buildah("umount", container)
    buildah("commit", "--rm", "--format", "docker", container, name)


def see_vllm(site: Path) -> None:
    """Let a Python's packages be this environment's, behind its own, and not our package."""
    site.mkdir(parents=True, exist_ok=True)
    hook = Path(sysconfig.get_paths()["purelib"]) / "torchvision_ops_hook.py"  # deploy/cpu
    lines = [STAND_IN, *(["import torchvision_ops_hook"] if hook.exists() else [])]
    (site / "stand_in.pth").write_text("\n".join(lines) + "\n")


def install_uv(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", name, UV]
        images_run.call(pip)
        shutil.copy2(Path(name) / "bin" / "uv", folder)


def make_gpu_base(buildah: Buildah, cpu_base: str, name: str) -> None:
    """As vLLM's GPU image has it: no virtual environment, and a user `vllm`."""
    container = buildah("from", "--pull-never", cpu_base)
    root = Path(buildah("mount", container))
    (site,) = (root / VENV[1:] / "lib").glob("python3.*/site-packages")
    see_vllm(root / "usr" / "local" / "lib" / site.parent.name / "dist-packages")
    for mark in (root / "usr" / "lib").glob("python3*/EXTERNALLY-MANAGED"):
        mark.unlink()
    shutil.copy2(root / "root" / ".local" / "bin" / "uv", root / "usr" / "local" / "bin")
    shutil.copy2(root / VENV[1:] / "bin" / "vllm", root / "usr" / "local" / "bin")
    home = ("--create-home", "--home-dir", "/home/vllm")
    buildah("run", container, "--", "useradd", "--uid", "2000", "--gid", "0", *home, "vllm")
    buildah("config", "--env", "VIRTUAL_ENV-", "--env", f"PATH={SYSTEM_PATH}", container)
    buildah("umount", container)
    buildah("commit", "--rm", "--format", "docker", container, name)


# -- the images ----------------------------------------------------------------------------------


def checkout(folder: Path) -> Path:
    """This checkout's files, as git knows them, in a copy that nobody but root may read.

    As after a clone under a strict umask: the image's user must be able to read them all the same.
    """
    files = images_run.call(["git", "-C", str(ROOT), "ls-files", "-z"]).split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
            target.chmod(0o600)
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o700)
    return folder


def build(buildah: Buildah, kind: str, context: Path) -> str:
    """Build one of our images; returns its name."""
    name = f"localhost/vllm-adaspark:{kind}"
    files = ("--file", str(context / DOCKERFILES[kind]), str(context))
    buildah("bud", "--pull-never", "--format", "docker", "--tag", name, *files)
    return name


def added(buildah: Buildah, image: str, base: str) -> int:
    """Bytes of the layers that an image has above its base."""
    (file,) = (WORK / "storage").glob("*-layers/layers.json")
    sizes = {layer["diff-digest"]: layer["diff-size"] for layer in json.loads(file.read_text())}
    mine, below = (
        json.loads(buildah("inspect", "--type", "image", name))["OCIv1"]["rootfs"]["diff_ids"]
        for name in (image, base)
    )
    assert mine[: len(below)] == below, "not built on its base"
    return sum(sizes[layer] for layer in mine[len(below) :])


def look_at(buildah: Buildah, image: str) -> dict[str, object]:
    """The configuration that the image carries, checked."""
    found = json.loads(buildah("inspect", "--type", "image", image))["Docker"]["config"]
    assert found["User"] == USER, found["User"]
    assert found["Healthcheck"]["Test"][0] == "CMD", found["Healthcheck"]
    assert found["Labels"]["org.opencontainers.image.version"], found["Labels"]
    return found


def run_in(buildah: Buildah, image: str, *command: str, env: tuple[str, ...] = ()) -> str:
    """What a command prints in a fresh container of an image, run as the image's user."""
    container = buildah("from", "--pull-never", image)
    try:
        return buildah("run", *env, container, "--", *command)
    finally:
        buildah("rm", container)


LOOK = """
import json, os, importlib.metadata as m
import av, vllm_adaspark
site = os.path.dirname(os.path.dirname(vllm_adaspark.__file__))
added = sorted(d.metadata["Name"] for d in m.distributions(path=[site]))
kept = [m.version(name) for name in ("torch", "numpy", "vllm")]
files = sorted(os.listdir("/opt/vllm-adaspark"))
writable = [path for path in ("/cache", "/home/vllm", "/tmp") if os.access(path, os.W_OK)]
print(json.dumps({"uid": os.getuid(), "gid": os.getgid(), "av": av.__version__,
                  "av_file": av.__file__, "added": added, "kept": kept, "files": files,
                  "writable": writable}))
"""


def check_contents(buildah: Buildah, image: str, base: str) -> None:
    """Who it runs as, what it holds, and that nothing of the base was replaced."""
    seen = json.loads(run_in(buildah, image, "python3", "-c", LOOK))
    assert (seen["uid"], seen["gid"]) == (2000, 0), seen
    assert seen["files"] == ["entrypoint.py", "health.py", "requirements.txt"], seen
    assert seen["writable"] == ["/cache", "/home/vllm", "/tmp"], seen
    kept = "import importlib.metadata as m; print(*map(m.version, ('torch', 'numpy', 'vllm')))"
    assert run_in(buildah, base, "python3", "-c", kept).split() == seen["kept"], seen
    pinned = (ROOT / "deploy" / "docker" / "requirements.txt").read_text()
    assert f"\nav=={seen['av']} " in pinned and not seen["av_file"].startswith(STAND_IN), seen
    assert seen["added"] == ["av", "vllm-adaspark"], seen
    line = run_in(buildah, image, *images_run.ENTRY, "Qwen/Qwen2.5-VL-7B-Instruct", "--print")
    assert "serve Qwen/Qwen2.5-VL-7B-Instruct" in line, line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="keep the stand-ins for the next run")
    parser.add_argument("--record", action="store_true", help="write docs/deployment.md")
    options = parser.parse_args()
    try:
        check_machine()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("image-test: ended by SIGTERM"))
        WORK.mkdir(exist_ok=True)
        run(options)
    except Failed as error:
        sys.exit(f"image-test: {error}")


def run(options: argparse.Namespace) -> None:
    buildah = Buildah(WORK)
    bases, images, result = {"debian": DEBIAN} | base_names(), {}, {}
    buildah("rm", "--all")  # of a run that was cut off
    try:
        for kind, make in (
            ("debian", lambda: make_debian(buildah, bases["debian"])),
            ("cpu", lambda: make_cpu_base(buildah, bases["debian"], bases["cpu"])),
            ("gpu", lambda: make_gpu_base(buildah, bases["cpu"], bases["gpu"])),
        ):
            if not buildah.exists(bases[kind]):
                with say(f"stand-in: {bases[kind]}") as took:
                    make()
                result[f"stand-in `{bases[kind]}`"] = took
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            context = checkout(Path(folder))
            for kind in DOCKERFILES:
                with say(f"build {DOCKERFILES[kind]}") as took:
                    images[kind] = build(buildah, kind, context)
                    look_at(buildah, images[kind])
                    check_contents(buildah, images[kind], bases[kind])
                megabytes = added(buildah, images[kind], bases[kind]) / 1e6
                took.note = f"adds {megabytes:.0f} MB to its base"
                result[f"`{DOCKERFILES[kind]}` built, looked into"] = took
        result |= images_run.serve(buildah, images["cpu"], WORK)
    finally:
        if options.keep:
            for image in images.values():
                buildah("rmi", "--force", image)
        else:
            buildah.remove()
    text = table(result)
    print(text)
    if options.record:
        pages.refill(DOCS, "images", {"result": f"\n{text}"})


def table(result: dict[str, images_run.Took]) -> str:
    now = datetime.datetime.now(datetime.UTC)
    machine = f"{images_run.cpu()}, {os.cpu_count()} threads"
    versions = ", ".join(
        f"{name} {images_run.version(name)}" for name in ("vllm", "torch", "vllm-adaspark")
    )
    lines = [
        f"{now:%-d %B %Y}, {machine}; {versions}.",
        "",
        "| step | took | seen |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {took.seconds:.0f} s | {took.note} |" for name, took in result.items()]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
