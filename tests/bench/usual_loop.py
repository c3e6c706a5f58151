"""The usual loop, for comparison: OpenSlide in DataLoader workers, eager torch; prints tiles per second.

``usual`` scales and normalises to float in the workers, like torchvision's transforms and most pipelines;
``lean`` sends bytes and lets the network scale them.
"""

import json
import sys
import time

import numpy as np
import openslide
import torch
from made import torch_graph


class Tiles(torch.utils.data.Dataset):
    def __init__(self, path, places, side, lean, graph):
        self.path, self.places, self.side, self.slide = path, places, side, None
        self.lean = lean
        self.mean = torch.tensor(graph.encoder.mean).view(3, 1, 1)
        self.std = torch.tensor(graph.encoder.std).view(3, 1, 1)

    def __len__(self):
        return len(self.places)

    def __getitem__(self, number):
        self.slide = self.slide or openslide.OpenSlide(self.path)
        picture = self.slide.read_region(self.places[number], 0, (self.side, self.side))
        tile = torch.from_numpy(np.array(picture.convert("RGB")))
        if self.lean:
            return tile
        scaled = tile.permute(2, 0, 1).contiguous().float().div(255)
        return scaled.sub_(self.mean).div_(self.std)


def main():
    path, views, batch, workers, side, places, lean = json.loads(sys.stdin.read())
    torch.set_num_threads(workers)
    graph = torch_graph(views)

    def net(tiles):
        if lean:
            return graph(tiles)
        unit = torch.nn.functional.normalize(graph.encoder(graph._all_views(tiles)), dim=1)
        return unit.reshape(views, -1, unit.shape[1]).mean(0)

    loader = torch.utils.data.DataLoader(
        Tiles(path, [tuple(p) for p in places], side, lean, graph),
        batch_size=batch,
        num_workers=workers,
        prefetch_factor=2,
    )
    with torch.inference_mode():
        graph(torch.zeros((batch, 224, 224, 3), dtype=torch.uint8))
        started = time.perf_counter()
        count = sum(len(net(tiles)) for tiles in loader)
    print(count / (time.perf_counter() - started))


if __name__ == "__main__":
    main()
