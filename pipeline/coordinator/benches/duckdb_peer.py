"""The peer of the bench `balance`: the same choice by DuckDB. Prints seconds, peak memory in bytes and rows written as JSON.

python duckdb_peer.py CANDIDATES_FOLDER OUT.parquet SPILL_FOLDER THREADS PER_QUERY

Written for speed: what decides is kept narrow (a number for a row, hashes for an address and a sample id), and the rest is read again
for the rows that stay. It has the memory that DuckDB takes by itself, four fifths of the machine's: with 4 GiB it does not get through 50
million rows.
"""
import json
import resource
import sys
import time

import duckdb

folder, out, spill, threads, per_query = sys.argv[1:]
candidates = f"read_parquet('{folder}/*.parquet', file_row_number=true)"
began = time.monotonic()
db = duckdb.connect(config={"threads": threads, "temp_directory": spill, "preserve_insertion_order": "false"})
# A number for a row: its file and its place in it. Of rows with one address and one rank the smallest hash stays.
db.execute(f"""
    CREATE TEMP TABLE kept AS
    SELECT k FROM (
        SELECT (file_index << 32) | file_row_number AS k,
               row_number() OVER (PARTITION BY hash(url) ORDER BY list_position(['alt', 'figcaption', 'title', 'list'], text_source), hash(sample_id)) AS nth
        FROM {candidates} WHERE len(queries) > 0)
    WHERE nth = 1""")
pairs = f"""(SELECT k, hash(sample_id) AS id, queries
             FROM (SELECT (file_index << 32) | file_row_number AS k, sample_id, queries FROM {candidates}) JOIN kept USING (k))"""
# Only queries with too many pairs have to choose: the others take all that they have.
db.execute(f"""
    CREATE TEMP TABLE contested AS
    SELECT query FROM (SELECT unnest(queries) AS query FROM {pairs}) GROUP BY query HAVING count(*) > {per_query}""")
db.execute(f"""
    CREATE TEMP TABLE taken AS
    WITH found AS (SELECT k, query, hash(id, query) AS draw FROM (SELECT k, id, unnest(queries) AS query FROM {pairs}))
    SELECT k, list(query ORDER BY query) AS selected_for
    FROM (SELECT k, query FROM found ANTI JOIN contested USING (query)
          UNION ALL
          SELECT k, query FROM (SELECT k, query, row_number() OVER (PARTITION BY query ORDER BY draw) AS nth
                                FROM found SEMI JOIN contested USING (query))
          WHERE nth <= {per_query})
    GROUP BY k""")
db.execute(f"""
    COPY (SELECT sample_id, url, text, text_source, page_url, source, queries, selected_for
          FROM (SELECT *, (file_index << 32) | file_row_number AS k FROM {candidates}) JOIN taken USING (k)
          ORDER BY sample_id)
    TO '{out}' (FORMAT parquet, COMPRESSION snappy)""")
seconds = time.monotonic() - began
rows = db.execute(f"SELECT count(*) FROM '{out}'").fetchone()[0]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "rows": rows, "version": duckdb.__version__}))
