import Foundation
import Glibc
import HostSystem
import TestSupport
import Testing

/// `openNamed` is `open` but for other people's links.
struct NamedPathTests {
  private let directory: String

  init() throws {
    directory = "/tmp/martlet-named-\(UUID().uuidString)"
    try FileManager.default.createDirectory(atPath: directory + "/d/e", withIntermediateDirectories: true)
    for file in ["f", "d/f", "d/e/f"] { try file.write(toFile: "\(directory)/\(file)", atomically: false, encoding: .utf8) }
    for (link, target) in [
      ("l", "f"), ("dl", "d"), ("absolute", "\(directory)/d"), ("d/up", ".."), ("twice", "dl/e/../f"), ("slash", "d/"), ("loop", "loop"),
      ("dangling", "none"), ("d/e/chain", "../up/dl/e"),
    ] { try FileManager.default.createSymbolicLink(atPath: "\(directory)/\(link)", withDestinationPath: target) }
  }

  /// The file that was opened, or the error.
  private func outcome(_ open: () throws -> OwnedFD) -> String {
    do {
      let fd = try open()
      var status = stat()
      return fstat(fd.rawValue, &status) == 0 ? "\(status.st_dev) \(status.st_ino)" : "lost"
    } catch { return (error as? SystemError)?.errno.name ?? "\(error)" }
  }

  @Test func everyPathLeadsWhereItLeadsTheKernel() throws {
    defer { try? FileManager.default.removeItem(atPath: directory) }
    let deep = String(repeating: "d/up/", count: 30) + "f"
    let paths =
      [
        "f", "l", "d", "dl", "dl/", "d/f", "dl/f", "absolute/e/f", "d/up/f", "twice", "slash/f", "slash", "loop", "loop/x", "dangling",
        "dangling/x", "f/", "f/x", "l/", "none", "none/x", "", ".", "..", "./d/./f", "d//f", "d/../f", "d/e/chain/f", deep,
        String(repeating: "x", count: 300), String(repeating: "d/up/", count: 41) + "f",
      ].map { $0.isEmpty ? "" : "\(directory)/\($0)" } + [
        "/", "//", "/..", ".", "..", "/dev/null", "/dev/stdin", "/dev/fd/0", "/proc/self/exe", "/proc/self/cwd", "/proc/self/root/tmp",
        "/proc/mounts", "/bin/sh", String(repeating: "/x", count: 3000),
      ]
    for path in paths {
      for flags: Int32 in [O_RDONLY, O_RDWR, 0o200000, 0o400000, 0o10000000, 0o10400000] {
        let theirs = outcome { try OwnedFD.open(path, flags | O_NOCTTY | O_NONBLOCK) }
        #expect(
          outcome { try OwnedFD.openNamed(path, flags | O_NOCTTY | O_NONBLOCK) } == theirs, "\(path), flags \(String(flags, radix: 8))")
      }
    }
    // One that makes files.
    for path in ["new", "dl/new", "dangling", "loop", "d", "none/x"] {
      for flags: Int32 in [O_WRONLY | O_CREAT | O_EXCL, O_WRONLY | O_CREAT | O_APPEND] {
        let whole = "\(directory)/\(path)"
        let mine = outcome { try OwnedFD.openNamed(whole, flags) }
        let isNew = mine.contains(" ")
        if isNew { #expect(access(whole, F_OK) == 0 && unlink(realpath(whole, nil)) == 0) }
        let theirs = outcome { try OwnedFD.open(whole, flags) }
        #expect(theirs.contains(" ") == isNew && (isNew || theirs == mine), "\(path): \(mine), \(theirs)")
        if isNew { #expect(unlink(realpath(whole, nil)) == 0) }
      }
    }
  }

  @Test(.enabled(if: geteuid() == 0, "Another user's link needs root."))
  func anotherUsersLinkIsNotFollowedWhereverItStands() throws {
    defer { try? FileManager.default.removeItem(atPath: directory) }
    for link in ["l", "dl", "dangling"] { try #require(lchown("\(directory)/\(link)", 65534, 65534) == 0) }
    for path in ["l", "dl", "dl/", "dl/f", "dl/../f", "twice", "d/up/dl/f", "d/e/chain/f", "dangling"] {
      let error = outcome { try OwnedFD.openNamed("\(directory)/\(path)", O_WRONLY | O_CREAT | O_NONBLOCK) }
      #expect(error == "EXDEV", "\(path): \(error)")
    }
    #expect(access("\(directory)/none", F_OK) != 0)
    for path in ["f", "d/f", "absolute/f"] { _ = try OwnedFD.openNamed("\(directory)/\(path)", O_RDONLY) }
  }
}
