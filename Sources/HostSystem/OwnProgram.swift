import CLinux
import Glibc

/// The program that is running.
public enum OwnProgram {
  /// The whole command line, the program's name first, without /proc. Before a process title is set: it stands in their place.
  public static var arguments: [String] {
    var result: [String] = []
    // SAFETY: the kernel's NUL-terminated strings; nil behind the last.
    while let text = unsafe clinux_argument(CInt(result.count)) { result.append(unsafe String(cString: text)) }
    return result
  }

  /// The directory of `/proc/self/exe`: Martlet's programs find each other beside themselves.
  public static func directory() throws(SystemError) -> String {
    let path = try executable()
    guard let slash = path.lastIndex(of: "/") else { return "/" }
    return slash == path.startIndex ? "/" : String(path[..<slash])
  }

  /// The path of the running program; nil where there is no /proc.
  public static var path: String? { try? executable() }

  private static func executable() throws(SystemError) -> String {
    var buffer = [CChar](repeating: 0, count: 4096)
    // SAFETY: readlink stores at most the given count, which is one less than the buffer has.
    let count = unsafe readlink("/proc/self/exe", &buffer, buffer.count - 1)
    guard count > 0 else { throw SystemError("read /proc/self/exe", Errno.current) }
    return String(decoding: buffer[..<count].map { UInt8(bitPattern: $0) }, as: UTF8.self)
  }
}
