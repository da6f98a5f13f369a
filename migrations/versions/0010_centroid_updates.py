"""Rows of the centroids' queue are updated in place: no index follows their status."""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision = "0009"

# A row goes from pending over running to done, and each step had to enter it anew into every index there is, as long as
# the condition of one names the status. There are as many rows as speakers, so a claim may as well walk the primary
# key: of 50,000 done ones that takes some milliseconds, and what it saves is a third of the work with few utterances a
# speaker. And room for a row's next version beside it.
IN_PLACE = """
DROP INDEX embstore.centroid_pending;
DROP INDEX embstore.centroid_running;
ALTER TABLE embstore.centroid SET (fillfactor = 50);
"""
BY_STATUS = """
CREATE INDEX centroid_pending ON embstore.centroid (dataset_id, model_id, centroid_id) WHERE status = 'pending';
CREATE INDEX centroid_running ON embstore.centroid (dataset_id, model_id, centroid_id) WHERE status = 'running';
ALTER TABLE embstore.centroid RESET (fillfactor);
"""


def upgrade() -> None:
    op.execute(IN_PLACE)


def downgrade() -> None:
    op.execute(BY_STATUS)
