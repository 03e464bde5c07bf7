import Foundation
import Glibc
import HostSystem
import TestSupport

/// A disk image on a file system that fails, waits and cuts short as it is told: a small FUSE server in a process of its own, in front
/// of an ordinary file. Its mount, its process and its files go away with it.
final class TroubleDisk {
  static let canRun = geteuid() == 0 && access("/dev/fuse", R_OK | W_OK) == 0 && access("/usr/bin/python3", X_OK) == 0

  private let directory = "/tmp/martlet-trouble-" + UUID().uuidString
  private let server = Process()
  var image: String { directory + "/mount/disk" }
  private var isServing = true

  init(byteCount: Int) throws {
    try FileManager.default.createDirectory(atPath: directory + "/mount", withIntermediateDirectories: true)
    guard FileManager.default.createFile(atPath: directory + "/backing", contents: nil) else { throw TestFailure("no backing file") }
    truncate(directory + "/backing", byteCount)
    try order()
    server.executableURL = URL(fileURLWithPath: "/usr/bin/python3")
    server.arguments = ["-c", Self.program, directory]
    try server.run()
    let end = MonotonicTime.now.advanced(by: .seconds(20))
    while access(image, F_OK) != 0 {
      guard MonotonicTime.now < end, server.isRunning else { throw TestFailure("the FUSE server does not serve") }
      usleep(5000)
    }
  }

  deinit {
    vanish()
    umount2(directory + "/mount", 2)
    try? FileManager.default.removeItem(atPath: directory)
  }

  /// What happens from now on: errors by request, seconds that each takes, and whether transfers do half of what they could.
  func order(read: Int32 = 0, write: Int32 = 0, sync: Int32 = 0, delay: Double = 0, isShort: Bool = false) throws {
    let text = "{\"15\": \(read), \"16\": \(write), \"20\": \(sync), \"delay\": \(delay), \"short\": \(isShort ? 1 : 0)}"
    try Data(text.utf8).write(to: URL(fileURLWithPath: directory + "/orders"), options: .atomic)
  }

  /// The storage is gone, with whatever was under way.
  func vanish() {
    guard isServing else { return }
    isServing = false
    kill(server.processIdentifier, SIGKILL)
    server.waitUntilExit()
  }

  /// What has reached the file: for each write its offset and first byte, in order.
  var landed: [(offset: Int, first: UInt8)] {
    ((try? String(contentsOfFile: directory + "/log", encoding: .utf8)) ?? "").split(separator: "\n").compactMap { line in
      let words = line.split(separator: " ")
      guard words.count == 2, let offset = Int(words[0]), let first = UInt8(words[1]) else { return nil }
      return (offset, first)
    }
  }

  /// How often what had been written was made stable.
  var syncCount: Int { FileManager.default.contents(atPath: directory + "/syncs")?.count ?? 0 }

  var content: [UInt8] { (FileManager.default.contents(atPath: directory + "/backing")).map { Array($0) } ?? [] }

  /// Serves one file, `disk`, past the kernel's cache. Messages are those of linux/fuse.h, minor version 31.
  private static let program = """
    import ctypes, json, os, struct, sys, threading
    from concurrent.futures import ThreadPoolExecutor
    place = sys.argv[1]
    backing = os.open(place + "/backing", os.O_RDWR)
    port = os.open("/dev/fuse", os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={port},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if libc.mount(b"trouble", (place + "/mount").encode(), b"fuse", 0, options): sys.exit(os.strerror(ctypes.get_errno()))
    guard = threading.Lock()

    def reply(unique, body=b"", error=0):
        os.write(port, struct.pack("<IiQ", 16 + len(body), -error, unique) + body)

    def attributes(node):
        size = 0 if node == 1 else os.fstat(backing).st_size
        mode = 0o40755 if node == 1 else 0o100600
        return struct.pack("<6Q10I", node, size, (size + 511) // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def work(opcode, unique, body):
        with open(place + "/orders") as file: orders = json.load(file)
        if opcode != 20: threading.Event().wait(orders["delay"])
        if orders[str(opcode)]: return reply(unique, error=orders[str(opcode)])
        if opcode == 20:
            with guard, open(place + "/syncs", "a") as log: log.write("s")
            return reply(unique)
        offset, count = struct.unpack_from("<QI", body, 8)
        if orders["short"] and count > 512: count = count // 2 // 512 * 512
        if opcode == 15: return reply(unique, os.pread(backing, count, offset))
        with guard:
            done = os.pwrite(backing, body[40:40 + count], offset)
            with open(place + "/log", "a") as log: log.write(f"{offset} {body[40]}\\n")
        reply(unique, struct.pack("<II", done, 0))

    pool = ThreadPoolExecutor(32)
    while True:
        try: message = os.read(port, 1 << 20)
        except InterruptedError: continue
        except OSError: break
        opcode, unique, node = struct.unpack_from("<IQQ", message, 4)
        body = message[40:]
        if opcode == 26: reply(unique, struct.pack("<4I2H2I2H8I", 7, 31, 0, 1 | 1 << 5, 32, 32, 1 << 17, 1, 0, 0, *[0] * 8))
        elif opcode == 1:
            if body.rstrip(b"\\0") == b"disk": reply(unique, struct.pack("<4Q2I", 2, 0, 1000, 0, 0, 0) + attributes(2))
            else: reply(unique, error=2)
        elif opcode in (3, 4): reply(unique, struct.pack("<Q2I", 0, 0, 0) + attributes(node))
        elif opcode in (14, 27): reply(unique, struct.pack("<Q2I", 1, 1, 0))
        elif opcode in (15, 16, 20): pool.submit(work, opcode, unique, body)
        elif opcode == 17: reply(unique, bytes(80))
        elif opcode in (18, 25, 29, 34): reply(unique)
        elif opcode not in (2, 36, 42): reply(unique, error=38)
    """
}
