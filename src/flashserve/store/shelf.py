"""Which files and models are in the arena, who shares and who leases them.

Plain bookkeeping under one lock: nothing here reads, waits, or calls anybody else's code.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence

from flashserve.errors import ConflictError, ModelTooLargeError, UnavailableError
from flashserve.store.checkpoint.listing import SourceFile
from flashserve.store.checkpoint.snapshot import Snapshot
from flashserve.store.dram.arena import ExtentState, Zone
from flashserve.store.images import Claimant, FileImage, Fill, Image
from flashserve.store.origin import Origin
from flashserve.types import ModelId


class Shelf:
    """The DRAM tier's contents. Thread-safe; every method is one step.

    A file is entered under its identity when its place is claimed, and leaves with its last user,
    at once when reading it failed or its bytes were damaged. So does an image with its last model
    and lease.
    """

    def __init__(self, arena: Zone) -> None:
        self._arena = arena
        self._lock = threading.RLock()
        self._unpinned = threading.Condition(self._lock)
        self._files: dict[str, FileImage] = {}
        self._images: dict[str, Image] = {}
        self._models: dict[ModelId, Image] = {}
        self._fills: set[Fill] = set()
        self._is_closed = False
        self.num_evicted = 0
        """Models that have left by `evict`."""

    def close(self) -> tuple[Fill, ...]:
        """Claims and leases are refused from now on, and reads told to stop; those that run."""
        with self._lock:
            self._is_closed = True
            for fill in self._fills:
                fill.stopping.set()
            return tuple(self._fills)

    def find(self, identity: str, model_id: ModelId, *, is_whole: bool = False) -> Image | None:
        """Gives an image that is there, or on its way unless it must be whole, to one more model,
        and leases it.
        """
        with self._lock:
            self._check_open()
            image = self._images.get(identity)
            if image is not None and is_whole > image.is_whole:
                return None
            if image is not None:
                self._attach(model_id, image)
                self._lease(image, model_id)
            return image

    def claim(
        self,
        snapshot: Snapshot,
        files: Sequence[SourceFile],
        model_id: ModelId,
        origin: Origin,
    ) -> tuple[Image, Fill | None]:
        """Makes a model's image, leased, of files that are there and places for those that are not.

        Args:
            snapshot: of the model.
            files: its weights, in the order of the layout.
            model_id: names the image from here on; what it named before is given up first.
            origin: has the files, and is where they are read from if others who do so fail.

        Returns:
            The image, and the files that must be read now.

        Raises:
            ModelTooLargeError: the arena is too small for the model, however empty.
            UnavailableError: there is no room now.
        """
        with self._lock:
            if image := self.find(snapshot.identity, model_id):
                return image, None
            self._detach(model_id)
            self._check_room(snapshot, files)
            new: list[FileImage] = []
            try:
                for file in files:
                    if file.identity not in self._files:
                        path = f"{snapshot.uri.rstrip('/')}/{file.name}"
                        extent = self._arena.allocate(file.num_bytes)
                        new.append(FileImage(file, path, extent, is_fetched=origin.is_fetched))
                        self._files[file.identity] = new[-1]
            except BaseException:
                for image_of_file in new:
                    self._drop_file(image_of_file)
                raise
            image = Image.make(snapshot, tuple(self._files[file.identity] for file in files))
            self._images[image.identity] = image
            for each in image.files:
                each.num_users += 1
            self._attach(model_id, image)
            self._lease(image, model_id)
            claimant = Claimant(model_id, image, origin)
            for fill in self._fills:
                if set(fill.files) & set(image.files):
                    fill.heirs.append(claimant)
            return image, self._fill(claimant, new) if new else None

    def lease(self, model_id: ModelId) -> Image:
        """Leases a model that is whole.

        Raises:
            ConflictError: it is not in DRAM.
        """
        with self._lock:
            image = self.whole(model_id)
            self._lease(image, model_id)
            return image

    def release(self, image: Image, model_id: ModelId) -> None:
        with self._lock:
            image.leases[model_id] -= 1
            for file in image.files:
                self._unpin(file)
            self._drop(image)

    def pin(self, file: FileImage) -> None:
        """Keeps one file in its place until `unpin`; it must have a user."""
        with self._lock:
            file.num_leases += 1
            if file.is_whole and file.num_leases == 1:
                self._arena.lease(file.extent)

    def try_pin(self, file: FileImage) -> bool:
        """Pins a whole file unless it has left."""
        with self._lock:
            if file not in self._files.values():
                return False
            self.pin(file)
            return True

    def look_at(
        self, file: FileImage, index: int
    ) -> contextlib.AbstractContextManager[memoryview] | None:
        """The bytes of one chunk, pinned from now until the view is left; None if they have gone.
        It must be entered.
        """
        return self._chunk(file, index) if self.try_pin(file) else None

    @contextlib.contextmanager
    def _chunk(self, file: FileImage, index: int) -> Iterator[memoryview]:
        try:
            with self._arena.memory(file.extent) as memory, file.chunk(memory, index) as data:
                yield data
        finally:
            self.unpin(file)

    def unpin(self, file: FileImage) -> None:
        with self._lock:
            self._unpin(file)
            self._drop_file(file)

    def landed(self, fill: Fill) -> None:
        """The bytes of a fill are complete and will not change again."""
        with self._lock:
            for file in fill.files:
                self._arena.seal(file.extent)
                file.is_whole = True
                if file.num_leases:
                    self._arena.lease(file.extent)
                self._merge(file)
            self._end(fill)

    def failed(self, fill: Fill, *, is_damaged: bool) -> tuple[Fill, ...]:
        """The bytes of a fill will not come from where it read them. Nobody finds its files any
        more, but for those that another model needs which has them from another source.

        Args:
            is_damaged: what it brought may be wrong as well, and must be compared.

        Returns:
            Who reads those files now.
        """
        with self._lock:
            left = set(fill.files)
            successors = [] if self._is_closed else list(self._successors(fill, left, is_damaged))
            for file in fill.files:
                if file in left:
                    self._withdraw(file)
            self._end(fill)
            return tuple(successors)

    def quarantine(self, file: FileImage) -> tuple[ModelId, ...]:
        """The bytes of a file are damaged: nobody finds them any more, and they go with the last
        lease. The models that had them.
        """
        with self._lock:
            return self._withdraw(file)

    def identify(self, file: FileImage, digest: str) -> None:
        """Notes the digest of a whole file. Of files with the same one only the first stays, as
        soon as nobody leases the other.
        """
        with self._lock:
            file.digest = digest
            self._merge(file)

    def wait_unpinned(self, files: Iterable[FileImage]) -> None:
        """Returns when no file stays only because somebody looks through it just now."""
        with self._unpinned:
            self._unpinned.wait_for(
                lambda: all(file.num_users or not file.num_leases for file in files)
            )

    def evict(self, model_id: ModelId) -> tuple[FileImage, ...]:
        """Takes a model out of DRAM. Its files, of which those go that nobody shares.

        Raises:
            ConflictError: the model is leased, or is being staged.
        """
        with self._lock:
            image = self._models.get(model_id)
            if image is None:
                return ()
            if image.leases[model_id]:
                state = "in use" if image.is_whole else "being staged"
                raise ConflictError(f"model {model_id} is {state}")
            self._detach(model_id)
            self.num_evicted += 1
            return image.files

    def forget(self, model_id: ModelId) -> None:
        """Its bytes go as soon as nobody leases or shares them."""
        with self._lock:
            self._detach(model_id)

    def fills(self, files: Iterable[FileImage]) -> tuple[Fill, ...]:
        """The reads under way that concern any of these files."""
        wanted = set(files)
        with self._lock:
            return tuple(fill for fill in self._fills if wanted & set(fill.files))

    def whole(self, model_id: ModelId) -> Image:
        """Raises ConflictError unless all of the model is in DRAM."""
        with self._lock:
            self._check_open()
            image = self._models.get(model_id)
            if image is None or not image.is_whole:
                raise ConflictError(f"model {model_id} is not in DRAM")
            return image

    def models(self) -> dict[ModelId, Image]:
        """What is there or on its way."""
        with self._lock:
            return dict(self._models)

    def files(self) -> tuple[FileImage, ...]:
        """Those that are whole, in the order in which they came."""
        with self._lock:
            return tuple(file for file in dict.fromkeys(self._files.values()) if file.is_whole)

    def _successors(self, fill: Fill, left: set[FileImage], is_damaged: bool) -> Iterator[Fill]:
        """Fills for files out of `left`, which are taken from it. No source is tried twice, unless
        the read was only stopped.
        """
        tried = fill.tried
        if not fill.stopping.is_set():
            tried |= {fill.claimant.origin.listing.uri}
        for number, heir in enumerate(fill.heirs):
            image, uri = heir.image, heir.origin.listing.uri
            files = [file for file in fill.files if file in left and file in image.files]
            if files and uri not in tried and self._images.get(image.identity) is image:
                left.difference_update(files)
                heirs = fill.heirs[number + 1 :]
                yield self._fill(heir, files, heirs, tried, skip_present=not is_damaged)

    def _fill(
        self,
        claimant: Claimant,
        new: Sequence[FileImage],
        heirs: Iterable[Claimant] = (),
        tried: frozenset[str] = frozenset(),
        *,
        skip_present: bool = False,
    ) -> Fill:
        image = claimant.image
        index_of = {file: index for index, file in enumerate(new)}
        order = dict.fromkeys(  # two names of one file need its chunks once
            (index_of[file], place.index)
            for place in image.order
            if (file := image.files[place.file_index]) in index_of
            and not (skip_present and file.has(place.index))
        )
        fill = Fill(claimant, tuple(new), tuple(order), heirs, tried)
        for file in fill.files:
            file.num_users += 1
        self._fills.add(fill)
        return fill

    def _end(self, fill: Fill) -> None:
        self._fills.discard(fill)
        for file in fill.files:
            file.num_users -= 1
            self._drop_file(file)

    def _check_room(self, snapshot: Snapshot, files: Sequence[SourceFile]) -> None:
        usage = self._arena.usage()
        needed = sum(self._arena.extent_bytes(file.num_bytes) for file in files)
        if needed > usage.total:
            raise ModelTooLargeError(
                f"{snapshot.uri} holds {snapshot.size_bytes} bytes of weights and needs {needed} "
                f"of memory; the arena has {usage.total}: raise {self._arena.setting}"
            )
        missing = {file.identity: file for file in files if file.identity not in self._files}
        needed = sum(self._arena.extent_bytes(file.num_bytes) for file in missing.values())
        if needed > usage.free:
            raise UnavailableError(
                f"no room for {needed} bytes of {snapshot.uri}: {usage.free} of the arena's "
                f"{usage.total} are free, the rest holds others"
            )

    def _attach(self, model_id: ModelId, image: Image) -> None:
        if self._models.get(model_id) is not image:
            self._detach(model_id)
            self._models[model_id] = image
            image.models.add(model_id)

    def _detach(self, model_id: ModelId) -> None:
        image = self._models.pop(model_id, None)
        if image is not None:
            image.models.discard(model_id)
            self._drop(image)

    def _lease(self, image: Image, model_id: ModelId) -> None:
        image.leases[model_id] += 1
        for file in image.files:
            self.pin(file)

    def _unpin(self, file: FileImage) -> None:
        assert file.num_leases > 0
        file.num_leases -= 1
        if file.is_whole and not file.num_leases:
            self._arena.release(file.extent)
            self._merge(file)
        self._unpinned.notify_all()

    def _merge(self, file: FileImage) -> None:
        """Gives the users of a file that nobody leases to one with the same bytes, if there is."""
        if not file.digest or not file.is_whole or file.num_leases:
            return
        if file not in self._files.values():
            return
        twins = (each for each in self.files() if each is not file)
        twin = next((each for each in twins if each.digest == file.digest), None)
        if twin is None:
            return
        for image in [image for image in self._images.values() if file in image.files]:
            num_swapped = image.files.count(file)
            image.files = tuple(twin if each is file else each for each in image.files)
            twin.num_users += num_swapped
            file.num_users -= num_swapped
        for identity in self._identities(file):
            self._files[identity] = twin
        self._drop_file(file)

    def _identities(self, file: FileImage) -> list[str]:
        return [identity for identity, each in self._files.items() if each is file]

    def _withdraw(self, file: FileImage) -> tuple[ModelId, ...]:
        """Nobody finds the file, or an image with it, any more."""
        for identity in self._identities(file):
            del self._files[identity]
        models: set[ModelId] = set()
        for image in [image for image in self._images.values() if file in image.files]:
            del self._images[image.identity]
            models |= image.models | set(+image.leases)
            for model_id in tuple(image.models):
                self._detach(model_id)
        return tuple(sorted(models))

    def _drop(self, image: Image) -> None:
        """Lets an image go that no model names and nobody leases."""
        if image.models or image.leases.total():
            return
        if self._images.get(image.identity) is image:
            del self._images[image.identity]
        for file in image.files:
            file.num_users -= 1
            self._drop_file(file)
        for fill in self._fills:
            if all(file.num_users == 1 for file in fill.files):
                fill.stopping.set()  # nobody but the fill itself has them

    def _drop_file(self, file: FileImage) -> None:
        if file.num_users or file.num_leases or file.extent.state is ExtentState.FREED:
            return
        for identity in self._identities(file):
            del self._files[identity]
        self._arena.free(file.extent)

    def _check_open(self) -> None:
        if self._is_closed:
            raise UnavailableError("the store is closed")
