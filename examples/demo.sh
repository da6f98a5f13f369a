#!/bin/sh
# Embed the sample speech on the embedded database, then ask who sounds like whom. Run it with `make demo`.
set -eu

# Always the embedded database: a demonstration has no business in the one that DATABASE_URL names, here or in .env,
# which embstore reads in the folder where it runs.
cd "$(dirname "$0")"
unset DATABASE_URL

printf '$ embstore extract speech --dataset demo --workers 2\n'
embstore extract speech --dataset demo --workers 2

printf '\n$ embstore status\n'
embstore status

printf '\nOne utterance of each voice, and the three that sound most like it (embstore sql "…", see examples/demo.sh):\n'
embstore sql "
with utterance as (
    select distinct on (speaker) * from embeddings_resemblyzer where dataset = 'demo' order by speaker, position
)
select utterance.path as utterance, near.path as neighbour, near.speaker, near.cosine
from utterance cross join lateral (
    select path, speaker, round((1 - (embedding <=> utterance.embedding))::numeric, 2) as cosine
    from embeddings_resemblyzer
    where dataset = 'demo' and item_id <> utterance.item_id
    order by embedding <=> utterance.embedding
    limit 3
) near
order by utterance.path, near.cosine desc"

if ! answer=$(embstore sql --format csv "
select format('nearest neighbour is the same voice for %s of %s utterances',
              count(*) filter (where near.speaker = utterance.speaker), count(*))
from embeddings_resemblyzer utterance cross join lateral (
    select speaker
    from embeddings_resemblyzer
    where dataset = 'demo' and item_id <> utterance.item_id
    order by embedding <=> utterance.embedding
    limit 1
) near
where utterance.dataset = 'demo'" 2>&1); then
    printf '%s\n' "$answer" >&2
    exit 1
fi
printf '\n'
printf '%s\n' "$answer" | grep '^nearest'
