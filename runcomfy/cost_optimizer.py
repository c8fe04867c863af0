"""Public door: what was spent, what it will be, and whether the books are right.

It lives in `runcomfy.application.cost_optimizer`.
"""

from runcomfy.application.cost_optimizer import Advice, CostOptimizer
from runcomfy.application.costs import By, Report, Row
from runcomfy.application.costs_check import Checked, Finding
from runcomfy.application.estimating import JobEstimate
from runcomfy.domain.estimate import Prediction, predict
from runcomfy.domain.forecast import Forecast

__all__ = [
    "Advice",
    "By",
    "Checked",
    "CostOptimizer",
    "Finding",
    "Forecast",
    "JobEstimate",
    "Prediction",
    "Report",
    "Row",
    "predict",
]
