// What the page keeps, in this browser alone.

const FORBIDDEN =
  "This browser keeps nothing of this page, which needs it for conversations: allow it to store " +
  "data of this site, then try again.";

/** Keep a small thing (a draft, a preset) by its name; null forgets it. */
export function keep(name, value) {
  if (value === null) localStorage.removeItem(`llama ${name}`);
  else localStorage.setItem(`llama ${name}`, JSON.stringify(value));
}

/** Return a small thing that was kept, null if there is none. */
export const recall = (name) => JSON.parse(localStorage.getItem(`llama ${name}`));

const openDatabase = () =>
  new Promise((resolve, reject) => {
    const request = indexedDB.open("llama", 1);
    const make = () => request.result.createObjectStore("conversations", { keyPath: "id" });
    const done = () => resolve(request.result);
    Object.assign(request, { onupgradeneeded: make, onsuccess: done, onerror: reject });
  });

/** The conversations by their id. */
export class Store {
  /** Called with the id and the record, if it is still there, after a change of any tab. */
  onChange = () => {};

  channel = new BroadcastChannel("llama");

  async open() {
    this.database = await openDatabase().catch(() => {
      throw new Error(FORBIDDEN);
    });
    this.channel.onmessage = async ({ data: id }) => this.onChange(id, await this.get(id));
  }

  // Resolves when the transaction is complete: what was written is then kept.
  work = (mode, job) =>
    new Promise((resolve, reject) => {
      const transaction = this.database.transaction("conversations", mode);
      const request = job(transaction.objectStore("conversations"));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onabort = () => reject(transaction.error ?? new Error("the browser refused"));
    });

  all = () => this.work("readonly", (store) => store.getAll());

  get = (id) => this.work("readonly", (store) => store.get(id));

  // One transaction, so that a change meets the record as it is, whatever another tab made of it.
  async write(id, change) {
    let record;
    await this.work("readwrite", (store) => {
      const request = store.get(id);
      request.onsuccess = () => {
        record = change(request.result);
        return record ? store.put(record) : store.delete(id);
      };
      return request;
    });
    this.channel.postMessage(id);
    this.onChange(id, record);
    return record;
  }

  put = (record) => this.write(record.id, () => record);

  remove = (id) => this.write(id, () => null);

  /** Return the record that a change has been made to, undefined if there is none. */
  update = (id, change) => this.write(id, (record) => (record && change(record), record));
}
