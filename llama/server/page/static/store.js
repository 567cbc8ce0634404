// What the page keeps, in this browser alone: conversations, presets and drafts.

const NAMES = ["conversations", "presets", "drafts"];

function openDatabase() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("llama", 1);
    request.onupgradeneeded = () =>
      NAMES.forEach((name) => request.result.createObjectStore(name, { keyPath: "id" }));
    request.onerror = () => reject(request.error);
    request.onsuccess = () => resolve(request.result);
  });
}

/** Records of one kind by their id. */
class Table {
  constructor(database, name, tell) {
    Object.assign(this, { database, name, tell });
  }

  // Resolves when the transaction is complete: what was written is then kept.
  work(mode, job) {
    return new Promise((resolve, reject) => {
      const transaction = this.database.transaction(this.name, mode);
      const request = job(transaction.objectStore(this.name));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onabort = () => reject(transaction.error ?? new Error("the browser refused"));
    });
  }

  all = () => this.work("readonly", (store) => store.getAll());

  get = async (id) => (await this.work("readonly", (store) => store.get(id))) ?? null;

  // One transaction, so that a change meets the record as it is, whatever another tab made of it.
  async write(id, change) {
    let record;
    await this.work("readwrite", (store) => {
      const request = store.get(id);
      request.onsuccess = () => {
        record = change(request.result ?? null);
        return record ? store.put(record) : store.delete(id);
      };
      return request;
    });
    this.tell(this.name, id, record);
    return record;
  }

  put = (record) => this.write(record.id, () => record);

  remove = (id) => this.write(id, () => null);

  /** Return the record that a change has been made to, null if there is none. */
  update = (id, change) => this.write(id, (record) => (record && change(record), record));
}

/** The same where the browser keeps nothing. */
class Memory extends Table {
  records = new Map();

  all = async () => [...this.records.values()];

  get = async (id) => this.records.get(id) ?? null;

  async write(id, change) {
    const record = change(structuredClone(await this.get(id)));
    if (record) this.records.set(id, record);
    else this.records.delete(id);
    this.tell(this.name, id, record);
    return record;
  }
}

// The database is too slow for what is to be kept while the page ends.
function atEnd(name, id, fields) {
  try {
    localStorage.setItem(`llama-end ${name} ${id}`, JSON.stringify(fields));
  } catch {
    // It is lost, as the browser wants it.
  }
}

function keysAtEnd() {
  try {
    return Object.keys(localStorage).filter((key) => key.startsWith("llama-end "));
  } catch {
    return []; // the browser forbids it
  }
}

/** Keep what was left `atEnd`: drafts, and messages that are longer than they are in the store. */
async function makeUp(tables) {
  for (const key of keysAtEnd()) {
    const [, name, id] = key.split(" ");
    const fields = JSON.parse(localStorage.getItem(key));
    localStorage.removeItem(key);
    await tables[name]?.write(id, (record) => {
      const isEmpty = !fields.text && !fields.attachments?.length;
      if (name === "drafts") return isEmpty ? null : { id, ...fields };
      const found = record?.messages[fields.id];
      if (found?.content.length < fields.content.length) Object.assign(found, fields);
      return record;
    });
  }
}

/**
 * Open the store: `all`, `get`, `put`, `remove` and `update` of conversations, and the presets of
 * system prompts ({name, text}) and the drafts by their names. `isLasting` is false where the
 * browser keeps nothing. `onChange`'s callback gets {name, id, record} of each change, of this tab
 * and of others; the record is null if it was removed.
 */
export async function openStore() {
  const [callbacks, channel] = [[], new BroadcastChannel("llama")];
  const hear = (change) => callbacks.forEach((callback) => callback(change));
  const tell = (name, id, record) => {
    channel.postMessage({ name, id });
    hear({ name, id, record });
  };
  const database = await openDatabase().catch(() => null);
  const kind = database ? Table : Memory;
  const [store, presets, drafts] = NAMES.map((name) => new kind(database, name, tell));
  channel.onmessage = async ({ data: { name, id } }) => {
    const table = { conversations: store, presets, drafts }[name];
    if (database) hear({ name, id, record: await table.get(id) });
  };
  await makeUp({ conversations: store, drafts });
  // A page that a browser took back from its history goes on with what it had.
  addEventListener("pageshow", ({ persisted }) => persisted && makeUp({}));
  return Object.assign(store, {
    isLasting: database !== null,
    onChange: (callback) => callbacks.push(callback),
    presets: () => presets.all(),
    putPreset: (preset) => presets.put({ ...preset, id: preset.name }),
    removePreset: (name) => presets.remove(name),
    draft: (name) => drafts.get(name),
    putDraft: (name, draft) => drafts.put({ ...draft, id: name }),
    removeDraft: (name) => drafts.remove(name),
    atEnd,
  });
}
