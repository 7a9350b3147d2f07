"""Filters: an expression of SQL that a stranger may have written, let through only if it can do nothing but compare.

LanceDB evaluates an expression, never a statement: it can neither write nor read files. But it knows hundreds of
functions, of which some fill the memory (``repeat``), it ignores whatever follows the expression, compares numbers with
text, and thousands of operators in a row or nested parentheses keep its parser busy for ever. So a filter is parsed
here, whole, and LanceDB gets what was understood::

    either    = both {OR both}
    both      = negated {AND negated}
    negated   = NOT negated | test
    test      = value [("=" | "==" | "!=" | "<>" | "<" | "<=" | ">" | ">=") value
              | [NOT] IN "(" literal {"," literal} ")" | [NOT] BETWEEN value AND value | [NOT] (LIKE | ILIKE) value
              | IS [NOT] (NULL | TRUE | FALSE)]
    value     = column | literal | NULL | function "(" value {"," value} ")" | "(" either ")"
    literal   = text | number | TRUE | FALSE | (DATE | TIMESTAMP) text
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from functools import partial

import pyarrow as pa

from muco.data.lines import whole_text
from muco.errors import MucoError
from muco.search.sql import ANY, CONDITION, DAY, NUMBER, TEXT, Token, Value, kind_of, moment, next_token

FUNCTIONS = {  # the kinds of their arguments, and of their result
    "lower": ([TEXT], TEXT),
    "upper": ([TEXT], TEXT),
    "length": ([TEXT], NUMBER),
    "starts_with": ([TEXT, TEXT], CONDITION),
    "ends_with": ([TEXT, TEXT], CONDITION),
    "contains": ([TEXT, TEXT], CONDITION),
    "abs": ([NUMBER], NUMBER),
}  # and "coalesce", which takes values of one kind
OPERATORS = ("=", "==", "!=", "<>", "<", "<=", ">", ">=")
LONGEST = 2000  # characters
DEEPEST = 16  # parentheses and NOTs inside each other; LanceDB reads few more


def quoted(text: str) -> str:
    """The text as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def checked_filter(where: str | None, columns: Mapping[str, pa.DataType]) -> str | None:
    """The filter, an expression of the grammar above, as LanceDB reads it, or None if it is blank.

    A column whose name has other characters than letters, digits and "_", or is a word of the grammar, is written in
    backquotes. Names differ by case only if two of the ``columns`` do.

    Raises a MucoError that names the place if the whole is not such an expression, compares values of two kinds, or is
    longer than LONGEST characters.
    """
    if where is not None and not isinstance(where, str):
        raise MucoError(f"the filter must be text, not {type(where).__name__}")
    if where is None or not where.strip():
        return None
    whole_text(where, "filter")
    if len(where) > LONGEST:
        raise MucoError(f"the filter has {len(where):,} characters; at most {LONGEST:,} are read")
    return _Parser(where, columns).whole()


class _Parser:
    """One method per rule of the grammar; each reads its part and returns it."""

    def __init__(self, where: str, columns: Mapping[str, pa.DataType]) -> None:
        self.where, self.columns = where, columns
        self.tokens, self.depth = self._tokens(), 0

    def _tokens(self) -> list[Token]:
        tokens, place = [], 0
        while not tokens or tokens[-1].kind != "end":
            tokens.append(next_token(self.where, place))
            if tokens[-1].kind == "unknown":
                raise self.refused(tokens[-1].place, "cannot be read; put text in 'single quotes'")
            place = tokens[-1].end
        return tokens[::-1]  # the next one is the last

    def whole(self) -> str:
        found = self.joined()
        if self.tokens[-1].kind != "end":
            raise self.refused(self.tokens[-1].place, "expected the end, AND or OR")
        return self.must_be(found, CONDITION).sql

    def joined(self, word: str = "or") -> Value:
        """The rule ``either``, or with "and" the rule ``both``."""
        rule = partial(self.joined, "and") if word == "or" else self.negated
        parts = [rule()]
        while self.takes(word):
            parts.append(rule())
        if len(parts) == 1:
            return parts[0]
        sql = f" {word.upper()} ".join(self.must_be(part, CONDITION).sql for part in parts)
        return Value(sql, CONDITION, parts[0].place)

    def negated(self) -> Value:
        place = self.tokens[-1].place
        if not self.takes("not"):
            return self.test()
        with self.deeper():
            found = self.must_be(self.negated(), CONDITION)
        return Value(f"NOT ({found.sql})", CONDITION, place)

    def test(self) -> Value:
        left = self.value()
        if self.tokens[-1].text in OPERATORS and self.tokens[-1].kind == "sign":
            operator = self.tokens.pop().text.replace("==", "=")
            left, right = self.alike(left, self.value())
            return Value(f"{left.sql} {operator} {right.sql}", CONDITION, left.place)
        if self.takes("is"):
            no, word = "NOT " if self.takes("not") else "", self.one_of("null", "true", "false")
            if not word:
                raise self.refused(self.tokens[-1].place, "expected NULL, TRUE or FALSE")
            if word != "NULL":
                self.must_be(left, CONDITION)
            return Value(f"{left.sql} IS {no}{word}", CONDITION, left.place)
        no = "NOT " if self.takes("not") else ""
        word = self.one_of("in", "between", "like", "ilike")
        if word == "IN":
            left, *values = self.alike(left, *self.listed())
            if other := next((value for value in values if not value.literal), None):  # LanceDB takes them as equal
                raise self.refused(other.place, "expected text, a number, TRUE, FALSE, DATE or TIMESTAMP")
            right = f"({', '.join(value.sql for value in values)})"
        elif word == "BETWEEN":
            low = self.value()
            self.needs("and")
            left, low, high = self.alike(left, low, self.value())
            right = f"{low.sql} AND {high.sql}"
        elif word:
            self.must_be(left, TEXT)
            right = self.must_be(self.value(), TEXT).sql
        elif no:
            raise self.refused(self.tokens[-1].place, "expected IN, BETWEEN, LIKE or ILIKE")
        else:
            return left
        return Value(f"{left.sql} {no}{word} {right}", CONDITION, left.place)

    def value(self) -> Value:
        token = self.tokens.pop()
        if token.text == "(" and token.kind == "sign":
            with self.deeper():
                found = self.joined()
            self.needs(")")
            return replace(found, sql=f"({found.sql})", place=token.place, literal=False)
        if token.kind == "text":
            return Value(token.text, TEXT, token.place, literal=True)
        if token.kind == "number":
            try:
                return Value(token.text, NUMBER, token.place, number=Decimal(token.text), literal=True)
            except InvalidOperation:
                raise self.refused(token.place, "a number of too large an exponent", token.text[:20]) from None
        if token.kind in ("word", "quoted"):
            return self.named(token)
        raise self.refused(token.place, "expected a column, text or a number")

    def named(self, token: Token) -> Value:
        word, after = token.text.lower(), self.tokens[-1]
        if token.kind == "word":
            if word in ("true", "false"):
                return Value(word.upper(), CONDITION, token.place, literal=True)
            if word == "null":
                return Value("NULL", ANY, token.place)
            if word in ("date", "timestamp") and after.kind == "text":
                return self.time(word, token.place)
            if after.text == "(" and after.kind == "sign":
                return self.called(token)
        name = token.text
        if name not in self.columns:
            alike = [column for column in self.columns if column.lower() == word]
            if len(alike) != 1:
                why = f"may be {' or '.join(alike)}" if alike else "not a column"
                raise self.refused(token.place, f"{why}; columns: {', '.join(sorted(self.columns))}", token.text)
            name = alike[0]
        return Value(f"`{name}`", kind_of(self.columns[name]), token.place, type=self.columns[name])

    def time(self, word: str, place: int) -> Value:
        """The literal whose text is the next token."""
        text = self.tokens.pop()
        found = moment(word, text.text)
        if found is None:
            example = "DATE '2020-01-31'" if word == "date" else "TIMESTAMP '2020-01-31 12:00:00'"
            raise self.refused(
                text.place, f"expected a {word} from the year 1 to 9999 such as {example}", text.text[:40]
            )
        fine = found.since % 1000  # which LanceDB would cut
        sql = f"CAST({text.text} AS TIMESTAMP(9))" if fine else f"{word.upper()} {text.text}"
        return Value(sql, DAY, place, moment=found, literal=True)

    def called(self, token: Token) -> Value:
        name = token.text.lower()
        if name != "coalesce" and name not in FUNCTIONS:
            known = ", ".join(sorted([*FUNCTIONS, "coalesce"]))
            raise self.refused(token.place, f"not a function that may be used; functions: {known}", token.text)
        values = self.listed()
        if name == "coalesce":
            values = self.alike(*values, compared=False)
            kind = next((value.kind for value in values if value.kind != ANY), ANY)
        else:
            takes, kind = FUNCTIONS[name]
            if len(values) != len(takes):
                raise self.refused(token.place, f"takes {len(takes)} values, not {len(values)}", token.text)
            for value, wanted in zip(values, takes, strict=True):
                self.must_be(value, wanted)
        times = {value.type for value in values if value.type is not None} if kind == DAY else set()
        type = times.pop() if len(times) == 1 else None  # its literals fit it
        return Value(f"{name}({', '.join(value.sql for value in values)})", kind, token.place, type=type)

    def listed(self) -> list[Value]:
        self.needs("(")
        with self.deeper():
            values = [self.value()]
            while self.takes(","):
                values.append(self.value())
        self.needs(")")
        return values

    # ── what the rules share ─────────────────────────────────────────────────────────────────────────────────────────

    def takes(self, what: str) -> bool:
        """Goes past the next token if it is this word or sign."""
        token = self.tokens[-1]
        if token.kind not in ("word", "sign") or token.text.lower() != what:
            return False
        self.tokens.pop()
        return True

    def one_of(self, *words: str) -> str:
        """Goes past the next token if it is one of these words; returns it in capitals, or ""."""
        return next((word.upper() for word in words if self.takes(word)), "")

    def needs(self, what: str) -> None:
        if not self.takes(what):
            raise self.refused(self.tokens[-1].place, f"expected {what.upper()}")

    @contextmanager
    def deeper(self) -> Iterator[None]:
        self.depth += 1
        if self.depth > DEEPEST:
            place = self.tokens[-1].place
            raise self.refused(place, f"more than {DEEPEST} parentheses and NOTs inside each other")
        yield
        self.depth -= 1

    def alike(self, first: Value, *others: Value, compared: bool = True) -> list[Value]:
        """The values, ready to be compared, or to be one value; a MucoError if they are of two kinds."""
        values = [first, *others]
        known = next((value for value in values if value.kind != ANY), first)
        for value in values:
            if value.kind not in (known.kind, ANY):
                why = f"{value.kind} cannot be compared with {known.kind}{_hint(value, known)}"
                raise self.refused(value.place, why)
        columns = [value.type for value in values if value.type is not None]
        for value in values:
            if misfit := value.misfit(columns) if compared or value.number is None else "":
                raise self.refused(value.place, misfit)
        return [value.beside(columns, compared=compared) for value in values]

    def must_be(self, value: Value, kind: str) -> Value:
        if value.kind not in (kind, ANY):
            raise self.refused(value.place, f"expected {kind}, not {value.kind}")
        return value

    def refused(self, place: int, why: str, what: str = "") -> MucoError:
        what = what or self.where[place : place + 20]
        shown = f"{what!r} (character {place + 1})" if what else "the end"
        return MucoError(f"the filter: {shown}: {why}; an example: label = 'cat' AND year >= 2020")


def _hint(one: Value, other: Value) -> str:
    """How a text and a date can be compared; "" for other kinds, and where neither of the two is a literal."""
    text, day = (one, other) if one.kind == TEXT else (other, one)
    if (text.kind, day.kind) != (TEXT, DAY):
        return ""
    if text.literal:
        return "; write DATE '2020-01-31'"
    if day.moment is None:
        return ""
    _, written, _ = day.sql.split("'")
    return f"; {text.sql} is text: write '{written}' alone"  # texts of ISO 8601 have the order of their dates
