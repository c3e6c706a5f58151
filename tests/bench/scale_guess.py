"""How well µm per pixel are estimated from nuclei: pictures of sources whose scale is known.

Up to 8 pictures of a source stand for a slide; each is also reduced to a half and a quarter. The bench
prints, per source and scale, the median estimate and how often the proposal (0.25, 0.5 or 1) is right,
wrong or missing. Ki-67 (ki67_immunoratio) comes from reports whose scale is not certain.
"""

import argparse
import csv
import io
import tarfile

import numpy as np
from judged import SHARED
from PIL import Image

from histoseek.serving.slides.scale_guess import USUAL, estimate, proposed

KNOWN = {
    "histo_mix.tar": {"crc_val7k": 0.5, "kumar_monuseg": 0.25, "tnbc_naylor": 0.25, "glas": 0.62},
    "histo_mix2.tar": {"ki67_immunoratio": 0.25, "lyon19_crops": 0.25, "bcss": None},
}
IHC = {"ki67_immunoratio", "lyon19_crops"}
DRAWS, PICTURES = 6, 8


def pictures():
    """The pictures of each source, with their µm per pixel."""
    for pack, sources in KNOWN.items():
        with tarfile.open(SHARED / pack) as archive:
            rows = list(
                csv.DictReader(io.TextIOWrapper(archive.extractfile("manifest.csv"), "utf-8"))
            )
            for row in rows:
                if row["source_id"] not in sources:
                    continue
                mpp = sources[row["source_id"]]
                if mpp is None:  # bcss states it by tile
                    mpp = 0.25 if "0.25" in row["mpp_if_known"] else 0.5
                file = archive.extractfile(row["file"])
                yield row["source_id"], mpp, Image.open(io.BytesIO(file.read())).convert("RGB")


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    found = {}
    for source, mpp, picture in pictures():
        for reduced in (1, 2, 4):
            if mpp * reduced <= 1.3:
                size = picture.width // reduced, picture.height // reduced
                found.setdefault((source, mpp * reduced), []).append(
                    np.asarray(
                        picture.resize(size, Image.Resampling.BOX) if reduced > 1 else picture
                    )
                )
    rng, totals = np.random.default_rng(0), {"H&E": np.zeros(3), "IHC": np.zeros(3)}
    print(f"{'source':20} {'mpp':>5} {'median':>7} {'right':>6} {'wrong':>6} {'none':>6}")
    for (source, mpp), some in sorted(found.items()):
        true = min(USUAL, key=lambda usual: abs(np.log2(usual / mpp)))
        guesses, states = [], np.zeros(3)
        for _ in range(DRAWS):
            drawn = rng.choice(len(some), min(PICTURES, len(some)), replace=False)
            guess = estimate([some[n] for n in drawn])
            guesses.append(np.nan if guess is None else guess)
            told = proposed(guess)
            states[2 if told is None else 0 if told == true else 1] += 1
        totals["IHC" if source in IHC else "H&E"] += states
        print(
            f"{source:20} {mpp:5.2f} {np.nanmedian(guesses):7.2f}",
            *(f"{s / DRAWS:6.2f}" for s in states),
        )
    for stain, states in totals.items():
        print(f"{stain:20} {'':5} {'':7}", *(f"{s / states.sum():6.2f}" for s in states))


if __name__ == "__main__":
    main()
