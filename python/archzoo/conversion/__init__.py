"""Architecture surgery: attention into latent attention, Mamba-2 or both; dense layers into experts."""

from archzoo.conversion.selection import sensitivity, smart, smart_allows
from archzoo.conversion.settings import Conversion
from archzoo.conversion.surgery import assemble, convert
from archzoo.conversion.upcycle import Upcycling
from archzoo.conversion.vocabulary import swap_vocabulary

__all__ = [
    "Conversion",
    "Upcycling",
    "assemble",
    "convert",
    "sensitivity",
    "smart",
    "smart_allows",
    "swap_vocabulary",
]
