mkdir -p /tmp/p/duomoe && cp -r duomoe/* /tmp/p/duomoe/ ; cp -r kernels models /tmp/p/duomoe/; export PYTHONPATH=/tmp/p PYTHONUNBUFFERED=1
rm -f /tmp/p/duomoe/__init__.py; touch /tmp/p/duomoe/__init__.py
export OUT=${OUT:-/tmp/out}
nvidia-smi -L; date
W=""; for o in mixtral qwen3 rest; do ONLY=$o timeout 170 python3 tests/kernels/_sweep.py --warm > $OUT/warm_$o.txt 2>&1 & W="$W $!"; done
PIDS=""
for f in tests/kernels/test_[!c]*.py tests/kernels/test_combine.py; do timeout 200 python3 -m pytest $f -q -m "not gpu" -p no:cacheprovider --confcutdir=tests/kernels --durations=3 > $OUT/$(basename $f).txt 2>&1 & PIDS="$PIDS $!"; done
timeout 200 python3 -m pytest tests/kernels -q -m gpu -p no:cacheprovider --confcutdir=tests/kernels --durations=5 > $OUT/gpu_marked.txt 2>&1 & PIDS="$PIDS $!"
wait $PIDS; date
cat $OUT/*.py.txt $OUT/gpu_marked.txt > $OUT/tests.txt; rm $OUT/*.py.txt
wait $W; date; cat $OUT/warm_*.txt > $OUT/warm.txt; rm $OUT/warm_*.txt
timeout ${SWEEP:-190} python3 tests/kernels/_sweep.py > $OUT/sweep.txt 2>&1
grep -E "passed|failed|error|^FAILED|^E  " $OUT/tests.txt | cut -c1-200 | tail -40
tail -3 $OUT/warm.txt; tail -5 $OUT/sweep.txt
