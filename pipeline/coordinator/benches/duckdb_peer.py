"""The peer of the bench `balance`: the same choice by DuckDB. Prints seconds, peak memory in bytes and rows written as JSON.

python duckdb_peer.py CANDIDATES_FOLDER OUT.parquet SPILL_FOLDER THREADS MEMORY_MIB PER_QUERY

Written for speed: what decides is kept narrow (a number for a row, a hash for a sample id), and addresses and texts are read again
for the rows that stay.
"""
import json
import resource
import sys
import time

import duckdb

folder, out, spill, threads, memory, per_query = sys.argv[1:]
candidates = f"read_parquet('{folder}/*.parquet', file_row_number=true)"
began = time.monotonic()
db = duckdb.connect(config={"threads": threads, "memory_limit": f"{memory}MiB", "temp_directory": spill, "preserve_insertion_order": "false"})
db.execute(f"""
    CREATE TEMP TABLE kept AS
    SELECT part, nr, hash(sample_id) AS id, queries
    FROM (SELECT file_index AS part, file_row_number AS nr, sample_id, queries,
                 row_number() OVER (PARTITION BY url
                                    ORDER BY list_position(['alt', 'figcaption', 'title', 'list'], text_source), hash(sample_id),
                                             sample_id, page_url, source) AS nth
          FROM {candidates}
          WHERE len(queries) > 0)
    WHERE nth = 1""")
db.execute(f"""
    CREATE TEMP TABLE taken AS
    SELECT k, list(query ORDER BY query) AS selected_for
    FROM (SELECT k, query, row_number() OVER (PARTITION BY query ORDER BY hash(id, query)) AS nth
          FROM (SELECT rowid AS k, id, unnest(queries) AS query FROM kept))
    WHERE nth <= {per_query}
    GROUP BY k""")
db.execute(f"""
    COPY (SELECT sample_id, url, text, text_source, page_url, source, c.queries, selected_for
          FROM {candidates} c
          JOIN (SELECT part, nr, selected_for FROM kept JOIN taken ON kept.rowid = taken.k) t ON c.file_index = t.part AND c.file_row_number = t.nr
          ORDER BY sample_id)
    TO '{out}' (FORMAT parquet, COMPRESSION snappy)""")
seconds = time.monotonic() - began
rows = db.execute(f"SELECT count(*) FROM '{out}'").fetchone()[0]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "rows": rows, "version": duckdb.__version__}))
