"""Architecture surgery: a pretrained attention model into latent attention, Mamba-2 or a hybrid of both."""

from archzoo.conversion.selection import sensitivity, smart, smart_allows
from archzoo.conversion.settings import Conversion
from archzoo.conversion.surgery import assemble, convert
from archzoo.conversion.vocabulary import swap_vocabulary

__all__ = ["Conversion", "assemble", "convert", "sensitivity", "smart", "smart_allows", "swap_vocabulary"]
