"""Training, validation and test parts of data that don't say their own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from mmpt.files import hash_fraction
from mmpt.source import Split


def hash_split(
    places: Iterable[tuple[str, str]], validation: float, test: float, seed: int
) -> dict[tuple[str, str], Split]:
    """Divide by a hash of the names; whatever is added later leaves the others where they are.

    Only where a stratum of three or more would give a split nothing, its nearest name is moved there.

    Args:
        places: (stratum, name) of each thing to be assigned.
        validation: fraction for validation.
        test: fraction for the test.
        seed: another seed, another division.
    """
    strata: dict[str, list[tuple[float, tuple[str, str]]]] = defaultdict(list)
    for place in places:
        strata[place[0]].append((hash_fraction("\0".join(place), seed), place))
    assigned: dict[tuple[str, str], Split] = {}
    for members in strata.values():
        members.sort()
        tests = sum(fraction < test for fraction, _ in members)
        validations = sum(fraction < test + validation for fraction, _ in members) - tests
        if len(members) >= 3:
            tests = max(tests, int(test > 0))
            validations = max(min(validations, len(members) - tests - 1), int(validation > 0))
            tests = min(tests, len(members) - validations - 1)
        for rank, (_, place) in enumerate(members):
            assigned[place] = "test" if rank < tests else "validation" if rank < tests + validations else "train"
    return assigned
