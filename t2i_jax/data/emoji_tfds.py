"""The TFDS builder of named drawings in five styles, from the icon packages of Iconify."""

import collections
import hashlib
import io
import json
import pathlib
import re
import shutil
import subprocess
import tarfile
import tempfile
from typing import NamedTuple

import tensorflow_datasets as tfds

from t2i_jax import errors

RES = 128
TEST_SHARE = 0.05  # of the pairs of a thing and a style that could be held out
TONE = re.compile("(.+?)-(medium-light|medium-dark|light|medium|dark)")
LEAST = 3  # styles of a thing of which one may be held out


class Package(NamedTuple):
    """An npm package: `@iconify-json/<name>` of a version.

    digest: SHA-256 of its icons.json.
    style: what captions call it.
    credit: whose drawings they are, and under which licence.
    """

    name: str
    version: str
    digest: str
    style: str
    credit: str


PACKAGES = (
    Package(
        "fluent-emoji-flat",
        "1.2.6",
        "f5f4cf457c0db2ad5a2e42e033e02e0c87d10e43d0164cfffb3bb84914970a63",
        "flat",
        "Fluent Emoji (flat), Microsoft Corporation, MIT",
    ),
    Package(
        "fluent-emoji",
        "1.2.7",
        "87f3336be6f46747d40d046a15ffa8b23809ff7a1a280b5d3521d3782fb85de7",
        "shaded",
        "Fluent Emoji, Microsoft Corporation, MIT",
    ),
    Package(
        "noto",
        "1.2.9",
        "9eac6ef4e7ec122b6f0e7ac281d61008afdbc720d0ce861e398b939daaa347c6",
        "noto",
        "Noto Emoji, Google Inc, Apache-2.0",
    ),
    Package(
        "twemoji",
        "1.2.5",
        "5d5d820790565b764f2728675d487c9ee4c1fc83916d8567d5aca8ba7527c242",
        "twemoji",
        "Twemoji, Twitter, Inc and other contributors, CC BY 4.0",
    ),
    Package(
        "fxemoji",
        "1.2.2",
        "d8ef67b94a32d0abcd314d1c35db56178eaa8fa8ad71130e312f3460e307c2bf",
        "firefox",
        "Firefox OS Emoji, Mozilla, Apache-2.0",
    ),
)
CREDITS = "; ".join(package.credit for package in PACKAGES)


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Every drawing of the packages without a skin tone: 128 px, transparent, its thing and style.

    The split "test" has pairs of a thing and a style. Of each such thing training has other styles.
    """

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # see openmoji_tfds

    def __init__(self, *, icons: str = "", **options):
        """icons: the folder that `found` looks in; by default npm fetches the packages."""
        self._icons = icons
        super().__init__(**options)

    def _info(self):
        text = tfds.features.Text()
        image = tfds.features.Image(shape=(RES, RES, 4), encoding_format="png")
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Named drawings in five styles. {CREDITS}.",
            homepage="https://github.com/iconify/icon-sets",
            license="MIT; Apache-2.0; CC BY 4.0",
            features=tfds.features.FeaturesDict({"image": image, "thing": text, "style": text}),
        )

    def _split_generators(self, dl_manager):
        drawings = dict(read(self._icons))
        held_out = in_test(drawings)
        return {
            "train": self._generate_examples(drawings, drawings.keys() - held_out),
            "test": self._generate_examples(drawings, held_out),
        }

    def _generate_examples(self, drawings, chosen):
        import resvg_py

        for thing, style in sorted(chosen):
            # Drawings must not depend on the fonts of the machine.
            png = resvg_py.svg_to_bytes(
                svg_string=drawings[thing, style], width=RES, height=RES, skip_system_fonts=True
            )
            example = {"image": io.BytesIO(png), "thing": thing, "style": style}
            yield f"{thing}/{style}", example


def in_test(pairs) -> set[tuple[str, str]]:
    """The pairs of a thing and a style that belong to the test split."""
    styles = collections.defaultdict(list)
    for thing, style in pairs:
        styles[thing].append(style)
    return {
        (thing, style)
        for thing, drawn in styles.items()
        if len(drawn) >= LEAST and (style := min(drawn, key=lambda s: _draw(thing, s)))
        # One pair of a thing at most, so that training keeps at least two of its styles.
        if _draw(thing, style) < TEST_SHARE
    }


def _draw(thing: str, style: str) -> float:
    """In [0, 1). A hash, so that new drawings do not move old ones to the other split."""
    digest = hashlib.sha256(f"{thing}/{style}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def read(folder: str = ""):
    """Yields ((thing, style), SVG) of the packages' drawings.

    Args:
      folder: where the packages lie, see `found`; by default npm fetches them.
    Raises:
      DataError: a package is not there or damaged, or npm is missing or fails.
    """
    with tempfile.TemporaryDirectory() as name:
        texts = {
            package: (found(folder, package) if folder else fetched(name, package))
            for package in PACKAGES
        }
    sets = {package: _icons(package, text) for package, text in texts.items()}
    # Firefox's names lack the dashes that the others' have.
    names = [name for icons in sets.values() for name in icons["icons"] if "-" in name]
    dashed = {name.replace("-", ""): name for name in names}
    for package, icons in sets.items():
        for name, icon in icons["icons"].items():
            if icon.get("hidden") or has_tone(name, icons["icons"]):
                continue
            sides = [icon.get(side, icons.get(side, 16)) for side in ("width", "height")]
            thing = dashed.get(name, name).replace("-", " ")
            yield (thing, package.style), svg(icon["body"], *sides)


def has_tone(name: str, names) -> bool:
    """Whether a drawing has a skin tone: "waving-hand-dark-skin-tone", or "waving-hand-dark" where
    there is a light one, too. A police car's light is none.
    """
    if "skin-tone" in name:
        return True
    toned = TONE.fullmatch(name)
    return bool(toned) and all(f"{toned[1]}-{tone}" in names for tone in ("light", "dark"))


def svg(body: str, width: int, height: int) -> str:
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{body}</svg>'
    )


def found(folder: str, package: Package) -> bytes:
    """The icons.json of a package in a folder: `<name>/icons.json`, also below node_modules."""
    places = (package.name, f"node_modules/@iconify-json/{package.name}")
    for place in places:
        path = pathlib.Path(folder) / place / "icons.json"
        if path.is_file():
            return path.read_bytes()
    raise errors.DataError(
        f"no {places[0]}/icons.json",
        where=str(folder),
        fix=f"run npm install @iconify-json/{package.name} there",
    )


def fetched(folder: str, package: Package) -> bytes:
    """The icons.json of a package from npm, which unpacks and runs nothing of it."""
    name = f"@iconify-json/{package.name}@{package.version}"
    where = "data source emoji"
    if not (npm := shutil.which("npm")):
        raise errors.DataError(
            "the drawings come from npm, which is not installed",
            where=where,
            fix="install it, or set config.data.icons to a folder with the packages "
            + ", ".join(f"{package.name}/icons.json" for package in PACKAGES),
        )
    command = [npm, "pack", "--silent", "--ignore-scripts", name]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise errors.DataError(
            f"npm cannot fetch {name}: {lines[-1]}",
            where=where,
            fix="see that npm's registry can be reached, or set config.data.icons to a folder",
        )
    archive = pathlib.Path(folder) / done.stdout.split()[-1]
    with tarfile.open(archive) as files:
        text = files.extractfile("package/icons.json").read()
    if hashlib.sha256(text).hexdigest() != package.digest:
        raise errors.DataError(f"{name} is not the one published", where=where, fix="try again")
    return text


def _icons(package: Package, text: bytes) -> dict:
    """A package's drawings, checked so far as they are read."""
    of = (ValueError, TypeError, AttributeError, KeyError)
    fix = "copy the package whole"
    with errors.explained(errors.DataError, "no drawings", where=package.name, fix=fix, of=of):
        icons = json.loads(text)
        for name, icon in icons["icons"].items():
            if not isinstance(name, str) or not isinstance(icon["body"], str):
                raise ValueError(name)
    return icons
