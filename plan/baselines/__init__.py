"""What others would do, one file each, on the same prices and judged by the same simulator as our own plan."""

from meshwright.plan.baselines import alpa, data_parallel, gpipe, inter_only, intra_only, megatron
from meshwright.plan.baselines.base import Baseline as Baseline
from meshwright.plan.baselines.base import compare as compare

BASELINES = tuple(each.BASELINE for each in (data_parallel, intra_only, inter_only, gpipe, megatron, alpa))
