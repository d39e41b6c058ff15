"""First file of a zygote: `python -s -P -S boot.py <JSON config>`.

It makes bare stand-ins for the packages above `jail`, so that absolute imports work while none of their code is run
or even visible in the jail, then hands over to `zygote.main`. A user's own verifier may import the whole package.
"""

import json
import os
import sys
import types


def _stand_in(name: str, path: list[str]) -> None:
    module = types.ModuleType(name)
    module.__path__ = path
    sys.modules[name] = module


if __name__ == "__main__":
    config = json.loads(sys.argv[1])
    sys.path.extend(folder for folder in config["path"] if folder not in sys.path)
    if not config["whole_package"]:
        _stand_in("prime_lightning", [])
        _stand_in("prime_lightning.verifiers", [])
        _stand_in("prime_lightning.verifiers.jail", [os.path.dirname(os.path.abspath(__file__))])
    from prime_lightning.verifiers.jail import zygote

    zygote.main(config)
