"""cc2dataset's parsing of one WAT file, without Spark: from the packed bytes in memory to its list of (url, alt).

    cc2dataset_peer.py FILE

For each line of its input it does one round and prints the CPU seconds that it took and the number of pairs.
"""

import io
import sys
import time
import types

# Spark (300 MB) takes no part in parsing; the module only wants its names.
for name, members in {"pyspark": ["SparkContext"], "pyspark.sql": ["SparkSession"], "pyspark.sql.functions": ["rand"]}.items():
    module = types.ModuleType(name)
    for member in members:
        setattr(module, member, None)
    sys.modules.setdefault(name, module)

from cc2dataset.main import extract_documents_from_wat  # noqa: E402

packed = open(sys.argv[1], "rb").read()
for _ in sys.stdin:
    begin = time.process_time()
    pairs = extract_documents_from_wat(io.BytesIO(packed), "image")
    print(time.process_time() - begin, len(pairs), flush=True)
