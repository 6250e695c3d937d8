"""Sharding rules: which dims of a primitive's operands and results may be split together."""

from meshwright.plan.rules.table import is_heavy as is_heavy
from meshwright.plan.rules.table import operator_flops as operator_flops
from meshwright.plan.rules.table import operator_kind as operator_kind
from meshwright.plan.rules.table import rule_of as rule_of
