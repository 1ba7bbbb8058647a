"""Influence functions: which training examples a prediction rests on."""

from curvlib.core.plan import Plan
from curvlib.influence.bank import RetrainingBank, retraining_bank
from curvlib.influence.candidates import Candidates, merged, uniform
from curvlib.influence.filters import bm25, tfidf
from curvlib.influence.horizon import training_damping
from curvlib.influence.influence import Influence
from curvlib.influence.language import LanguageInfluence, for_causal_lm
from curvlib.influence.lds import LDS, linear_datamodeling_score
from curvlib.influence.matrix import BoundedScores, bounded_scores, measured_recall, score_matrix
from curvlib.influence.merge import merged_searches
from curvlib.influence.mislabel import MislabelDetection, mislabel_detection
from curvlib.influence.plan import planned
from curvlib.influence.proximal import ProximalResponse, proximal_response
from curvlib.influence.recall import Recall, recall
from curvlib.influence.refined import refined
from curvlib.influence.removal import RemovalCurve, removal_curve
from curvlib.influence.result import InfluenceScores, SelfInfluence, TopInfluence
from curvlib.influence.selection import DampingSelection, select_damping
from curvlib.influence.store import ScoreMatrix
from curvlib.operators.factors.factored_damping import factored_damping
from curvlib.operators.scores.example_values import error_norms, example_losses, gradient_norms

__all__ = [
    "LDS",
    "BoundedScores",
    "Candidates",
    "DampingSelection",
    "Influence",
    "InfluenceScores",
    "LanguageInfluence",
    "MislabelDetection",
    "Plan",
    "ProximalResponse",
    "Recall",
    "RemovalCurve",
    "RetrainingBank",
    "ScoreMatrix",
    "SelfInfluence",
    "TopInfluence",
    "bm25",
    "bounded_scores",
    "error_norms",
    "example_losses",
    "factored_damping",
    "for_causal_lm",
    "gradient_norms",
    "linear_datamodeling_score",
    "measured_recall",
    "merged",
    "merged_searches",
    "mislabel_detection",
    "planned",
    "proximal_response",
    "recall",
    "refined",
    "removal_curve",
    "retraining_bank",
    "score_matrix",
    "select_damping",
    "tfidf",
    "training_damping",
    "uniform",
]
