"""Whether this machine computes what the reference says, operation by operation."""

from normscope.doctor.diagnosis import Report, Row, diagnose
from normscope.doctor.machine import DeviceInfo, Machine, find_machine

__all__ = ["DeviceInfo", "Machine", "Report", "Row", "diagnose", "find_machine"]
