"""All measurements, one after the other: `make bench`."""

from bench import compare, kill, large, methods, outliers, speed

for part in (speed, large, methods, compare, outliers, kill):
    print(f"\n## {part.__name__}\n", flush=True)
    part.main()
