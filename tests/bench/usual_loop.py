"""The usual loop, as a peer: OpenSlide in a DataLoader's workers, torch eager; prints tiles per second."""

import json
import sys
import time

import numpy as np
import openslide
import torch
from made import torch_graph


class Tiles(torch.utils.data.Dataset):
    def __init__(self, path, places, side):
        self.path, self.places, self.side, self.slide = path, places, side, None

    def __len__(self):
        return len(self.places)

    def __getitem__(self, number):
        self.slide = self.slide or openslide.OpenSlide(self.path)
        picture = self.slide.read_region(self.places[number], 0, (self.side, self.side))
        return torch.from_numpy(np.array(picture.convert("RGB")))


def main():
    path, views, batch, workers, side, places = json.loads(sys.stdin.read())
    torch.set_num_threads(workers)
    graph = torch_graph(views)  # takes uint8 and normalises inside, like ours: less to copy
    loader = torch.utils.data.DataLoader(
        Tiles(path, [tuple(p) for p in places], side),
        batch_size=batch,
        num_workers=workers,
        prefetch_factor=2,
    )
    with torch.inference_mode():
        graph(torch.zeros((batch, 224, 224, 3), dtype=torch.uint8))
        started = time.perf_counter()
        count = sum(len(graph(tiles)) for tiles in loader)
    print(count / (time.perf_counter() - started))


if __name__ == "__main__":
    main()
