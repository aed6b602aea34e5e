"""Build SH3D-15, the labelled shapes that ship with the package, from Sweet Home 3D's furniture catalogues.

    python scripts/build_sh3d.py [--deb FILE] [--out any2point/data]

Takes Debian's package `sweethome3d-furniture` (fetched with apt-get unless --deb names a copy), reads the
catalogues in it, groups their human-made models into 15 classes by name, samples each surface and writes
sh3d15.npz and ATTRIBUTION.md. The same package gives the same arrays.

Licences: all five catalogues of that package are CC0 or CC BY 3.0, and a model whose own licence file says
otherwise than its catalogue is listed under its own. Sweet Home 3D's default catalogue (GPL) is not used.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from any2point.data import READERS, sample_surface
from any2point.data.sample import grouped_mask

PACKAGE = "sweethome3d-furniture"
VERSION = "1.8-1"
SHA256 = "3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668"
NUM_POINTS = 2048
MIN_PER_CLASS = 15
TEST_FRACTION = 0.3
# Two shapes are near copies if the mean distance from the points of one to those of the other is less than
# this many times what two samples of one and the same surface give. Copies and recoloured or restyled
# variants come to 0.95 to 1.4; the next pairs that a person would call different shapes (two beds, two cars)
# begin at 1.6.
NEAR_COPY = 1.5

CC0, CC_BY, CC_BY_US = "CC0-1.0", "CC-BY-3.0", "CC-BY-3.0-US"
LICENCE_URL = {
    CC0: "https://creativecommons.org/publicdomain/zero/1.0/",
    CC_BY: "https://creativecommons.org/licenses/by/3.0/",
    CC_BY_US: "https://creativecommons.org/licenses/by/3.0/us/",
}
# Licence and copyright notice, from the package's copyright file and each catalogue's LICENSE.TXT.
CATALOGUES = {
    "BlendSwap-CC-0": (
        CC0,
        "The Blend Swap contributors named below; converted by Emmanuel Puybaret / eTeks",
    ),
    "BlendSwap-CC-BY": (
        CC_BY,
        "The Blend Swap contributors named below; converted by Emmanuel Puybaret / eTeks",
    ),
    "KatorLegaz": (CC_BY_US, "(C) 2003-2008 Andrew Kator & Jennifer Legaz"),
    "Reallusion": (CC_BY_US, "(C) 2008-2016 Reallusion, http://www.reallusion.com/"),
    "Scopia": (
        CC_BY,
        "(C) 2006-2020 Scopia Visual Interfaces Systems, s.l., http://www.scopia.es and "
        "(C) 2014-2020 Emmanuel Puybaret / eTeks <info@eteks.com>",
    ),
}

# Classes by the catalogue's English name; the first pattern that matches decides, "" leaves the model out.
RULES = [
    (
        "",
        r"contemporary living room|car model|toy|game|tennis|pool table|football table|tablet|table fan"
        r"|changing table|table with(?!.*cloth)|plate, glass|baby high|wheelchair|deck chair|relax chair"
        r"|beach chair|pool lounge|doll|rocking horse|plant box|flower box|light source|dart|window shutter"
        r"|window blind|venetian|curtain|elevator|dog house|barnum|garden|hedge|camera|glove|service hatch"
        r"|shower|^frame|tatami|magnifying|air |frame ",
    ),
    ("switch_socket", r"plug$|plug |switch|socket|plug type|type [a-g] plug"),
    ("lamp", r"lamp|light|lantern|spotlight|uplight|candle|chandelier"),
    ("bed", r"\bbed\b|crib|futon$|bunk|mezzanine bed|day bed"),
    (
        "cabinet",
        r"cabinet|bedside table|wardrobe|bookcase|shelves|dresser|cupboard|\bchest\b(?! freezer)|tv stand"
        r"|tv unit|locker|television cabinet|filing",
    ),
    ("sofa", r"armchair|sofa|couch|winchester"),
    ("chair", r"chair|class seat|stool"),
    ("table", r"table|desk|workbench"),
    ("door", r"(?<!in)door\b(?!.*bell)|garage door"),
    ("window", r"window"),
    (
        "plant",
        r"plant|acacia|bamboo|coconut tree|pine|bush|beech|cypress|ficus|maple|blossom|palm tree|poplar"
        r"|bonsai|cactus|christmas tree|flowers|orchids|spathi|tulips|lily|yucca|\btree\b",
    ),
    (
        "vehicle",
        r"^bus|city bus|chevrolet|concept sedan|ford focus|peugeot|renault|suv|seat leon|smart car|^truck"
        r"|vw new|^van$|fork lift|bicycle|^bike|scooter|motorbike|yamaha|tricycle",
    ),
    (
        "vessel",
        r"bottle|\bglass$|cup$|mug|vase|\bjar\b|flacon|teapot|pottery|creamer|kettle|^bowl$|milk|utensils pot"
        r"|cosmetics pot|^basin$",
    ),
    (
        "sanitary",
        r"toilet unit|toilets unit|bidet|washbasin|vanity|^sink|urinal|\bbath$|bathtub|lavatory"
        r"|fitted bath|potty",
    ),
    (
        "appliance",
        r"fridge|refrigerator|oven|stove(?! gr)|cooker|washing machine|clothes washer|dryer machine"
        r"|dishwasher|microwave|freezer|boiler|toaster|coffee (machine|maker)|deep fryer"
        r"|electric water heater|gaz water",
    ),
]
PERSON = r"boy|girl|male|mannequin"


class Shape(NamedTuple):
    """One catalogue entry that is kept."""

    catalogue: str
    name: str
    label: str
    creator: str
    licence: str
    url: str
    points: np.ndarray  # [8192, 3] float64, centred, in the unit sphere


def label_of(name: str, category: str) -> str:
    """The class of a catalogue entry, or ""."""
    low = name.lower()
    if category.startswith("Char"):
        return "person" if re.search(PERSON, low) else ""
    if "mannequin" in low:
        return "person"
    return next((label for label, pattern in RULES if re.search(pattern, low)), "")


def entries(properties: str) -> Iterator[dict[str, str]]:
    """The numbered blocks of a catalogue's properties file, in order."""
    blocks: dict[int, dict[str, str]] = defaultdict(dict)
    for line in properties.splitlines():
        match = re.match(r"(\w+)#(\d+)=(.*)", line.strip())
        if match:
            blocks[int(match[2])][match[1]] = match[3].strip()
    yield from (blocks[number] for number in sorted(blocks))


def own_licence(archive: zipfile.ZipFile, folder: str) -> tuple[str, str]:
    """The licence and the web address that the licence file beside a model names; "" for what is not said."""
    text = "".join(
        archive.read(name).decode("latin-1")
        for name in archive.namelist()
        if name.startswith(folder + "/") and "licen" in name.lower()
    )
    low = text.lower()
    if re.search(r"share.?alike|by-sa|by-nc|non.?commercial|general public", low):
        raise ValueError(f"{folder}: its licence file allows less than CC BY")
    address = re.search(r"blendswap\.com/blends/view/\d+", text)
    licence = (
        CC0 if "creative commons zero" in low else CC_BY if "creative commons attribution 3.0" in low else ""
    )
    return licence, f"https://www.{address[0]}" if address else ""


def read_catalogue(path: Path, seen: set[str]) -> Iterator[Shape]:
    """The labelled models of one catalogue, without exact copies of what was seen before."""
    licence, _ = CATALOGUES[path.stem]
    archive = zipfile.ZipFile(path)
    for entry in entries(archive.read("PluginFurnitureCatalog.properties").decode("latin-1")):
        label = label_of(entry["name"], entry.get("category", ""))
        if not label:
            continue
        model = entry["model"].lstrip("/")
        data = archive.read(model)
        geometry = b"\n".join(line.strip() for line in data.splitlines() if line[:2] in (b"v ", b"f "))
        digest = hashlib.sha256(geometry).hexdigest()
        if digest in seen:
            continue
        seen.add(digest)
        vertices, faces = READERS[".obj"](data)
        if faces is None:
            continue
        if "modelRotation" in entry:
            vertices = vertices @ np.array(entry["modelRotation"].split(), np.float64).reshape(3, 3).T
        seed = hashlib.sha256(f"{path.stem}/{model}".encode()).digest()
        generator = np.random.default_rng(np.frombuffer(seed, np.uint32))
        points = in_unit_sphere(sample_surface(vertices, faces, 4 * NUM_POINTS, generator))
        own, url = own_licence(archive, model.rpartition("/")[0])
        yield Shape(path.stem, entry["name"], label, entry.get("creator", ""), own or licence, url, points)


def in_unit_sphere(points: np.ndarray) -> np.ndarray:
    """The points with their mean at the origin and the farthest at distance 1."""
    points = points - points.mean(axis=0)
    return points / np.linalg.norm(points, axis=1).max()


def near_copy_groups(shapes: list[Shape]) -> np.ndarray:
    """A number per shape, equal for shapes linked by a chain of near copies of one class."""
    group = np.arange(len(shapes))
    extent = np.stack([np.ptp(shape.points, axis=0) for shape in shapes])
    # Half the points are sqrt(2) farther apart than all of them.
    own = [distance(shape.points, shape.points[2 * NUM_POINTS :]) / 2**0.5 for shape in shapes]
    for i, one in enumerate(shapes):
        for j in range(i):
            other = shapes[j]
            if one.label != other.label or np.abs(extent[i] - extent[j]).max() > 0.1:
                continue
            apart = max(distance(one.points, other.points), distance(other.points, one.points))
            if apart < NEAR_COPY * max(own[i], own[j]):
                group[group == group[i]] = group[j]
    return np.unique(group, return_inverse=True)[1].astype(np.int16)


def distance(points: np.ndarray, others: np.ndarray) -> float:
    """Mean distance of 512 of the points to their nearest other point."""
    a, b = points[:512].astype(np.float32), others.astype(np.float32)
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return float(np.sqrt(np.maximum(squared.min(axis=1), 0)).mean())


def attribution(shapes: list[Shape]) -> str:
    """The attribution file."""
    lines = [
        "# SH3D-15: authors and licences of the sample shapes",
        "",
        f"`sh3d15.npz` holds {len(shapes)} shapes, sampled from 3D models in the furniture catalogues of",
        f"[Sweet Home 3D](https://www.sweethome3d.com/), as packaged by Debian (`{PACKAGE}` {VERSION}).",
        "What was changed: of every model only 2048 random surface points are kept, centred and scaled to",
        "the unit sphere; class labels were given by `scripts/build_sh3d.py`. No author endorses this use.",
        "The points are under the licence of the model that they come from:",
        "",
        "| catalogue | shapes | licence | copyright |",
        "|---|---|---|---|",
    ]
    for catalogue, (_, notice) in CATALOGUES.items():
        used = Counter(shape.licence for shape in shapes if shape.catalogue == catalogue)
        terms = ", ".join(f"[{name}]({LICENCE_URL[name]}) {count}" for name, count in sorted(used.items()))
        lines.append(f"| {catalogue} | {sum(used.values())} | {terms} | {notice} |")
    for catalogue in CATALOGUES:
        lines += [
            "",
            f"## {catalogue}",
            "",
            "| shape | class | author | licence | source |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {s.name} | {s.label} | {s.creator} | {s.licence} | {s.url or 'catalogue'} |"
            for s in shapes
            if s.catalogue == catalogue
        ]
    return "\n".join(lines) + "\n"


def build(deb: Path, work: Path) -> tuple[dict[str, np.ndarray], str]:
    """Read the package and return the arrays of the data file and the attribution text."""
    digest = hashlib.sha256(deb.read_bytes()).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{deb}: expected sha256 {SHA256}, got {digest}")
    subprocess.run(["dpkg-deb", "-x", str(deb), str(work)], check=True)
    folder = work / "usr/share/sweethome3d/furniture"
    seen: set[str] = set()
    found = [shape for name in CATALOGUES for shape in read_catalogue(folder / f"{name}.sh3f", seen)]
    counts = Counter(shape.label for shape in found)
    classes = sorted(label for label, count in counts.items() if count >= MIN_PER_CLASS)
    shapes = [shape for label in classes for shape in found if shape.label == label]
    labels = np.array([classes.index(shape.label) for shape in shapes], np.uint8)
    group = near_copy_groups(shapes)
    arrays = {
        "points": np.stack([in_unit_sphere(s.points[:NUM_POINTS]) for s in shapes]).astype(np.float16),
        "labels": labels,
        "classes": np.array(classes),
        "names": np.array([shape.name for shape in shapes]),
        "source": np.array([shape.catalogue for shape in shapes]),
        "creator": np.array([shape.creator for shape in shapes]),
        "licence": np.array([shape.licence for shape in shapes]),
        "group": group,
        "test": grouped_mask(labels, group, TEST_FRACTION, seed=0),
    }
    return arrays, attribution(shapes)


def main() -> None:
    """Parse the command line, build, write, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--deb", type=Path, help="a copy of the Debian package; default: fetch it with apt-get"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "any2point/data")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        deb = args.deb
        if deb is None:
            subprocess.run(["apt-get", "download", f"{PACKAGE}={VERSION}"], cwd=work, check=True)
            deb = next(work.glob("*.deb"))
        arrays, text = build(deb, work / "package")
    np.savez_compressed(args.out / "sh3d15.npz", **arrays)  # type: ignore[arg-type]
    (args.out / "ATTRIBUTION.md").write_text(text)
    size = (args.out / "sh3d15.npz").stat().st_size
    content = hashlib.sha256(b"".join(arrays[name].tobytes() for name in ("points", "labels", "test")))
    print(f"{len(arrays['labels'])} shapes, {size / 1e6:.2f} MB")
    print(f"sha256 of points, labels, test: {content.hexdigest()}")
    for label, name in enumerate(arrays["classes"]):
        of_class = arrays["labels"] == label
        groups, test = len(np.unique(arrays["group"][of_class])), arrays["test"][of_class].sum()
        print(f"{name:14} {of_class.sum():3} shapes, {groups:3} groups, {test:3} in the test set")


if __name__ == "__main__":
    main()
