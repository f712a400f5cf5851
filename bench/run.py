"""All measurements, one after the other: `make bench`."""

from bench import compare, decoding, kill, large, linear, methods, outliers, speed

for part in (speed, large, methods, compare, outliers, linear, decoding, kill):
    print(f"\n## {part.__name__}\n", flush=True)
    part.main()
