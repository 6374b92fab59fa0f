"""The operators of linear modules by name, for those who need many."""

from turret.server.adapters.operators.circulant import Circulant as Circulant
from turret.server.adapters.operators.dense import Dense as Dense
from turret.server.adapters.operators.hadamard import Hadamard as Hadamard
from turret.server.adapters.operators.kronecker import Kronecker as Kronecker
from turret.server.adapters.operators.low_rank import ExpertLowRank as ExpertLowRank
from turret.server.adapters.operators.low_rank import LowRank as LowRank
from turret.server.adapters.operators.low_rank import piece_sums as piece_sums
from turret.server.adapters.operators.sparse import MAX_SPARSE_INPUTS as MAX_SPARSE_INPUTS
from turret.server.adapters.operators.sparse import Sparse as Sparse
