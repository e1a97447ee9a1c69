"""The datasets of the benchmarks: what there are, where they lie on disk, and opening them.

Importing this takes no time; pixels, Arrow and the like are imported where a dataset is opened.
"""

from declip.evaluation.datasets.catalogue import BENCHMARKS, Benchmark, benchmark
from declip.evaluation.datasets.downloading import download
from declip.evaluation.datasets.layouts import Found
from declip.evaluation.datasets.opening import find, listing, open_dataset

__all__ = ["BENCHMARKS", "Benchmark", "Found", "benchmark", "download", "find", "listing", "open_dataset"]
