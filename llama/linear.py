"""The projections: fairscale's parallel layers, and where their matrix products happen.

fairscale fills each new weight, through a full-size master copy when there are several ranks. A
checkpoint fills these: a weight is made in this rank's size, on the default device (``meta``
included), and its memory isn't touched.
"""

import torch
from fairscale.nn.model_parallel import layers as fairscale_layers
from torch import nn

from llama.parallel import world_size


def _split(features: int, what: str) -> int:
    ranks = world_size()
    if features % ranks:
        raise ValueError(f"{what} of {features} can't be divided among {ranks} ranks")
    return features // ranks


def _empty_weight(out_features: int, in_features: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(out_features, in_features))


class ColumnParallelLinear(fairscale_layers.ColumnParallelLinear):
    """``x @ weight.T``, each rank computing its part of the outputs.

    ``gather_output`` joins the parts on every rank.
    """

    def __init__(self, in_features: int, out_features: int, *, gather_output: bool = False):
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.gather_output = gather_output
        self.weight = _empty_weight(_split(out_features, "an output width"), in_features)
        self.bias = None


class RowParallelLinear(fairscale_layers.RowParallelLinear):
    """``x @ weight.T`` of inputs that lie split over the ranks; the ranks' sums are added."""

    def __init__(self, in_features: int, out_features: int):
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.input_is_parallel = True
        self.weight = _empty_weight(out_features, _split(in_features, "an input width"))
        self.bias = None


class ParallelEmbedding(fairscale_layers.ParallelEmbedding):
    """The token embedding; each rank keeps its part of every row."""

    def __init__(self, num_embeddings: int, embedding_dim: int):
        nn.Module.__init__(self)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = None
        self.max_norm = None
        self.norm_type = 2.0
        self.scale_grad_by_freq = False
        self.sparse = False
        self.weight = _empty_weight(num_embeddings, _split(embedding_dim, "the embedding width"))
