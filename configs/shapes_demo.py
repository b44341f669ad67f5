"""The ten-minute demo: shapes_flow, shortened for two CPU cores.   make demo"""

from configs import shapes_flow


def get_config(arg=None):
    return shapes_flow.get_config(arg)
