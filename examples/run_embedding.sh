#!/bin/sh
# Ask which folder, model and number of workers, then embed. EMBEDDING_MODEL, EMBEDDING_WORKERS and DB_MAX_CONNECTIONS in
# the environment or in .env are offered as answers; any flags of `embstore extract` may follow.
#
#     examples/run_embedding.sh
#     examples/run_embedding.sh /data/photos --media image
exec embstore extract --interactive "$@"
