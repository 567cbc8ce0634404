// What the page keeps, in this browser alone: conversations, presets and drafts.

const NAMES = ["conversations", "presets", "drafts"];

function openDatabase() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("llama", 1);
    request.onupgradeneeded = () => {
      for (const name of NAMES) request.result.createObjectStore(name, { keyPath: "id" });
    };
    request.onerror = () => reject(request.error);
    request.onsuccess = () => {
      request.result.onversionchange = () => request.result.close();
      resolve(request.result);
    };
  });
}

/** Records of one kind by their id, in IndexedDB. */
class Table {
  constructor(database, name, tell) {
    Object.assign(this, { database, name, tell });
  }

  // Resolves when the transaction is complete: what was written is then on the disk.
  transact(mode, work) {
    return new Promise((resolve, reject) => {
      const transaction = this.database.transaction(this.name, mode);
      let result;
      work(transaction.objectStore(this.name), (value) => (result = value));
      transaction.oncomplete = () => resolve(result);
      transaction.onabort = () => reject(transaction.error ?? new Error("It couldn't be saved."));
    });
  }

  all() {
    return this.transact("readonly", (store, done) => {
      store.getAll().onsuccess = (event) => done(event.target.result);
    });
  }

  get(id) {
    return this.transact("readonly", (store, done) => {
      store.get(id).onsuccess = (event) => done(event.target.result ?? null);
    });
  }

  async put(record) {
    await this.transact("readwrite", (store) => store.put(record));
    this.tell(this.name, record.id, structuredClone(record));
  }

  async remove(id) {
    await this.transact("readwrite", (store) => store.delete(id));
    this.tell(this.name, id, null);
  }

  /** Change a record as it is now, whatever another tab has made of it; null if there is none. */
  async update(id, change) {
    const record = await this.transact("readwrite", (store, done) => {
      store.get(id).onsuccess = ({ target: { result } }) => {
        if (result === undefined) return done(null);
        change(result);
        store.put(result);
        done(result);
      };
    });
    if (record) this.tell(this.name, id, record);
    return record;
  }
}

/** The same, of a browser that keeps nothing. */
class MemoryTable extends Table {
  records = new Map();

  async transact(mode, work) {
    let result;
    const found = (value) => ({
      set onsuccess(then) {
        then({ target: { result: structuredClone(value) } });
      },
    });
    const store = {
      getAll: () => found([...this.records.values()]),
      get: (id) => found(this.records.get(id)),
      put: (record) => this.records.set(record.id, structuredClone(record)),
      delete: (id) => this.records.delete(id),
    };
    work(store, (value) => (result = value));
    return result;
  }
}

/**
 * Open the store: `all`, `get`, `put`, `remove` and `update` of conversations, and the presets of
 * system prompts ({name, text}) and the drafts by their names. `isLasting` is false where the
 * browser keeps nothing. `onChange`'s callback gets {name, id, record} of each change, of this tab
 * and of others; the record is null if it was removed.
 */
export async function openStore() {
  const callbacks = [];
  const channel = new BroadcastChannel("llama");
  const tell = (name, id, record, isMine = true) => {
    if (isMine) channel.postMessage({ name, id });
    for (const callback of callbacks) callback({ name, id, record });
  };
  const database = await openDatabase().catch(() => null);
  const kind = database ? Table : MemoryTable;
  const [store, presets, drafts] = NAMES.map((name) => new kind(database, name, tell));
  const tables = { conversations: store, presets, drafts };
  channel.onmessage = async ({ data: { name, id } }) => {
    if (database) tell(name, id, await tables[name].get(id), false);
  };
  return Object.assign(store, {
    isLasting: database !== null,
    onChange: (callback) => callbacks.push(callback),
    presets: () => presets.all(),
    putPreset: (preset) => presets.put({ ...preset, id: preset.name }),
    removePreset: (name) => presets.remove(name),
    draft: (name) => drafts.get(name),
    putDraft: (name, draft) => drafts.put({ ...draft, id: name }),
    removeDraft: (name) => drafts.remove(name),
  });
}
