"""`python -m cgpt_ext`: which implementation serves each op on this machine, and why."""

from cgpt_ext.dispatch import report


def main() -> None:
    found = report()
    cpu = found["cpu"]
    print(f"cpu: {cpu['isa']} of {', '.join(cpu['available'])}; {cpu['threads']} threads")
    for op, devices in found["ops"].items():
        for device, row in devices.items():
            print(f"{op:14} {device:12} {row['implementation']:10} {row['why']}")


if __name__ == "__main__":
    main()
