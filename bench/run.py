"""All measurements, one after the other: `make bench`."""

from bench import kill, large, methods, speed

for part in (speed, large, methods, kill):
    print(f"\n## {part.__name__}\n", flush=True)
    part.main()
