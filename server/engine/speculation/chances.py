"""How often draft tokens were right, by how much text agreed with the place they come from."""

from __future__ import annotations

from turret.server.engine.speculation.text_index import MAX_MATCH

# Before anything is known, by the number of tokens that agree. Experience with answers that extract
# or format what is in their prompt; too high, and a few rows are lost until it is known better.
_PRIOR = (0.0, 0.15, 0.35, 0.5, 0.65, 0.75, 0.8, 0.85, 0.9)
# Weight of a new observation in the exponential average.
_RATE = 0.2
# Upper bound of a probability: any answer may end.
_MOST = 0.97
# When drafts do not pay, one token is still tried every so many steps.
_TRY_EVERY = 32


class Chances:
    """Exponential averages, one for each length of a match, the same for all requests of a mix."""

    def __init__(self) -> None:
        self._chances = list(_PRIOR)
        self._passed_over = [0] * (MAX_MATCH + 1)

    def of(self, match: int) -> float:
        """The chance that a draft token is right before which ``match`` tokens agree."""
        return min(self._chances[min(match, MAX_MATCH)], _MOST)

    def pass_over(self, match: int) -> bool:
        """A draft does not pay. Returns whether to try it all the same, to learn of a change."""
        self._passed_over[match] += 1
        if self._passed_over[match] < _TRY_EVERY:
            return False
        self._passed_over[match] = 0
        return True

    def learn(self, match: int, num_draft: int, num_accepted: int) -> None:
        """A draft was checked.

        Args:
            match: How many tokens agreed before its first; a token that is right agrees as well.
            num_draft: Its tokens.
            num_accepted: Those that were right, up to the first that was not.
        """
        for number in range(min(num_accepted + 1, num_draft)):
            place = min(match + number, MAX_MATCH)
            found = 1.0 if number < num_accepted else 0.0
            self._chances[place] += _RATE * (found - self._chances[place])
