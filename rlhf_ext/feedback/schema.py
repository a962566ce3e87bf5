"""Tables of the label store, the same on SQLite and PostgreSQL.

Texts, candidates and labels are only ever added; triggers refuse UPDATE and DELETE on them, whoever asks. What may
change is the state of work: leases, and how many labels a comparison still misses, a number derived from its labels.
Times are seconds since 1970 UTC.
"""

from sqlalchemy import (
    DDL,
    JSON,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    event,
    text,
)


SCHEMA_VERSION = 1

metadata = MetaData()
OptionalJSON = JSON(none_as_null=True)

store = Table(
    "rlhf_ext_store",
    metadata,
    Column("name", String, primary_key=True),
    Column("value", Integer, nullable=False),
)

comparisons = Table(
    "comparisons",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("pool", Text, nullable=False),
    Column("prompt", OptionalJSON),
    Column("num_candidates", Integer, nullable=False),
    Column("extra", OptionalJSON),
    # SHA-256 over prompt and candidates; adding the same comparison twice gives one row.
    Column("fingerprint", String(64), nullable=False),
    Column("created", Double, nullable=False),
    Column("overlap", Integer, nullable=False),
    Column("missing", Integer, nullable=False),
    UniqueConstraint("pool", "fingerprint"),
    CheckConstraint("num_candidates >= 2", name="at_least_two_candidates"),
    CheckConstraint("overlap >= 1", name="at_least_one_label"),
    CheckConstraint("missing >= 0", name="missing_is_a_count"),
    sqlite_autoincrement=True,
)
# What is done is never looked at again by who searches for work.
Index(
    "comparisons_to_label",
    comparisons.c.pool,
    comparisons.c.id,
    sqlite_where=comparisons.c.missing > 0,
    postgresql_where=comparisons.c.missing > 0,
)

candidates = Table(
    "candidates",
    metadata,
    Column("comparison_id", Integer, ForeignKey("comparisons.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("completion", JSON, nullable=False),
    Column("policy", Text),
    Column("sampling", OptionalJSON),
    Column("truncated", Boolean, nullable=False),
    Column("checksum", String(64), nullable=False),
)

assignments = Table(
    "assignments",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("comparison_id", Integer, ForeignKey("comparisons.id"), nullable=False),
    Column("annotator", Text, nullable=False),
    Column("claimed", Double, nullable=False),
    # A lease that is answered or given back ends at that moment.
    Column("expires", Double, nullable=False),
    sqlite_autoincrement=True,
)
Index("assignments_by_comparison", assignments.c.comparison_id, assignments.c.expires)
Index("assignments_by_annotator", assignments.c.annotator, assignments.c.expires)

labels = Table(
    "labels",
    metadata,
    # In the order in which labels became visible, so that "all after this id" misses none.
    Column("id", Integer, primary_key=True),
    Column("comparison_id", Integer, ForeignKey("comparisons.id"), nullable=False),
    Column("annotator", Text, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("value", OptionalJSON),
    Column("seconds", Double),
    Column("comment", Text),
    # Stored positions of the candidates in the order in which the annotator saw them.
    Column("shown", OptionalJSON),
    Column("created", Double, nullable=False),
    # One label is replaced once: a history is a chain, never a tree.
    Column("supersedes", Integer, ForeignKey("labels.id"), unique=True),
    Column("key", Text),
    UniqueConstraint("annotator", "key"),
    CheckConstraint(
        "kind IN ('best', 'tie', 'target', 'ranking', 'incomparable', 'skip', 'undo')", name="kind_is_known"
    ),
    sqlite_autoincrement=True,
)
# An annotator has one chain per comparison: a second first label is refused by the database itself.
Index(
    "labels_one_chain",
    labels.c.comparison_id,
    labels.c.annotator,
    unique=True,
    sqlite_where=text("supersedes IS NULL"),
    postgresql_where=text("supersedes IS NULL"),
)
Index("labels_by_comparison", labels.c.comparison_id)
Index("labels_by_annotator", labels.c.annotator, labels.c.id)


def _append_only(table: Table) -> None:
    message = f"{table.name} are append-only: add a row that supersedes the old one"
    for action in ("UPDATE", "DELETE"):
        trigger = f"{table.name}_no_{action.lower()}"
        sqlite = (
            f"CREATE TRIGGER {trigger} BEFORE {action} ON {table.name} BEGIN SELECT RAISE(ABORT, '{message}'); END"
        )
        event.listen(table, "after_create", DDL(sqlite).execute_if(dialect="sqlite"))
    function = f"{table.name}_append_only"
    for statement in (
        f"CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{message}'; END $$",
        f"CREATE TRIGGER {function} BEFORE UPDATE OR DELETE OR TRUNCATE ON {table.name} "
        f"FOR EACH STATEMENT EXECUTE FUNCTION {function}()",
    ):
        event.listen(table, "after_create", DDL(statement).execute_if(dialect="postgresql"))


_append_only(candidates)
_append_only(labels)
