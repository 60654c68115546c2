# pyright runs without the installed packages; to it a dtype of jaxtyping is the type in its brackets.
from typing import Annotated as Bool
from typing import Annotated as Float
from typing import Annotated as Float32
from typing import Annotated as Float64
from typing import Annotated as Int
from typing import Annotated as Int32
from typing import Annotated as Int64
from typing import Annotated as Integer
from typing import Annotated as Key
from typing import Annotated as Num
from typing import Annotated as Real
from typing import Annotated as Shaped
from typing import Annotated as UInt8
from typing import Annotated as UInt32

__all__ = [
    "Bool", "Float", "Float32", "Float64", "Int", "Int32", "Int64", "Integer", "Key", "Num", "Real", "Shaped",
    "UInt8", "UInt32",
]  # fmt: skip
